"""Exercise 5: orthogonality, Eq. (9), and canonicalize."""

import torch

from course.checking import about, f64, holds, layer_of, learns, numbers, same
from salora import canonicalize, orthogonality

CALL = "canonicalize(layer)"


def by_hand():
    layer = layer_of(2, 2, 2)
    layer.B.data, layer.A.data = f64([[1.0, 0.0], [1.0, 1.0]]), f64([[2.0, 0.0], [0.0, 1.0]])
    return layer


@about("orthogonality", "9")
def test_two_triplets_by_hand():
    """B = [[1, 0], [1, 1]] has B^T B - I = [[1, 1], [1, 0]]; A = [[2, 0], [0, 1]] has A A^T - I = [[3, 0], [0, 0]]."""
    same(orthogonality([by_hand()]), 3.0 + 9.0, "orthogonality([layer]): 1 + 1 + 1 for B, and 9 for A")


@about("orthogonality", "9")
def test_it_is_0_for_orthonormal_triplets_and_r_for_b_0():
    layer = layer_of(6, 5, 3)
    layer.B.data, layer.A.data = torch.eye(6).double()[:, :3], torch.eye(5).double()[2:]
    same(orthogonality([layer]), 0.0, "orthogonality([layer]) with orthonormal columns of B and rows of A")
    layer.B.data.zero_()
    same(orthogonality([layer]), 3.0, "orthogonality([layer]) with r = 3 and B = 0: the norm of -I, squared")


@about("orthogonality", "9")
def test_it_is_a_sum_over_layers_of_any_shapes():
    one, other = by_hand(), layer_of(7, 3, 1)
    other.B.data.zero_()
    other.A.data = f64([[1.0, 1.0, 1.0]])
    same(orthogonality([one, other]), 12.0 + 1.0 + 4.0, "orthogonality([layer, other])")
    same(orthogonality(iter([one, other])), 17.0, "orthogonality(iter([layer, other])): any iterable")
    same(orthogonality({"a": one, "b": other}), 17.0, "orthogonality({name: layer}): also what salora_layers returns")


@about("orthogonality", "9")
def test_its_gradient_is_4_b_times_gram_minus_identity():
    layer = by_hand()
    value = orthogonality([layer])
    learns(value, "orthogonality([layer])", "A and B")
    value.backward()
    same(layer.B.grad, [[4.0, 4.0], [8.0, 4.0]], "the gradient for B = [[1, 0], [1, 1]]: 4 B (B^T B - I)")


@about("canonicalize", "canonical")
def test_the_product_does_not_change():
    layer = layer_of(5, 4, 3)
    product = (layer.B @ layer.A).detach()
    canonicalize(layer)
    same(layer.B @ layer.A, product, f"B A after {CALL}", within=1e-9)


@about("canonicalize", "canonical")
def test_columns_of_b_and_rows_of_a_become_orthogonal_and_share_the_singular_values():
    layer = layer_of(5, 4, 3)
    singular = torch.diag(torch.linalg.svdvals((layer.B @ layer.A).detach())[:3])
    canonicalize(layer)
    same(layer.B.T @ layer.B, singular, f"B^T B after {CALL}: the singular values, largest first", within=1e-8)
    same(layer.A @ layer.A.T, singular, f"A A^T after {CALL}: the singular values, largest first", within=1e-8)


@about("canonicalize", "canonical")
def test_more_triplets_than_the_matrix_has_rank_leave_empty_ones():
    layer = layer_of(2, 5, 4)
    product = (layer.B @ layer.A).detach()
    canonicalize(layer)
    same(layer.B.shape, [2, 4], f"the shape of B after {CALL}")
    same(layer.B @ layer.A, product, f"B A after {CALL}, with r = 4 and d = 2", within=1e-9)
    same(layer.A[2:].norm() + layer.B[:, 2:].norm(), 0.0, f"triplets 2 and 3 after {CALL}, with d = 2", within=1e-6)


@about("canonicalize", "canonical")
def test_a_and_b_stay_the_same_parameters():
    layer = layer_of(5, 4, 3)
    A, B = layer.A, layer.B
    canonicalize(layer)
    same_objects = layer.A is A and layer.B is B
    holds(same_objects, CALL, "new Parameters, of which the optimizer knows nothing", "the same ones with other values")


@about("canonicalize", "canonical")
def test_a_layer_whose_b_is_0_stays_as_it_is():
    layer = layer_of(5, 4, 3)
    layer.B.data.zero_()
    A = layer.A.detach().clone()
    canonicalize(layer)
    same(layer.A, A, f"A after {CALL} with B = 0: an untrained layer must not lose its A")
    same(layer.B, numbers(5, 3) * 0, f"B after {CALL} with B = 0")
