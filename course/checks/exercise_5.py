"""Exercise 5: orthogonality, Eq. (9), and canonicalize."""

import torch

from course.checking import about, f64, learned, same
from course.questions import canonicalized, layer_of, orthogonality, orthogonality_gradients

CALL = "canonicalize(layer)"
SIZES = dict(d=5, k=4, r=3)
BY_HAND = dict(d=2, k=2, r=2, B=f64([[1.0, 0.0], [1.0, 1.0]]), A=f64([[2.0, 0.0], [0.0, 1.0]]))


def product(layer):
    ours = layer_of(**layer)
    return (ours.B @ ours.A).detach()


@about("orthogonality", "9")
def test_two_triplets_by_hand():
    """B = [[1, 0], [1, 1]] has B^T B - I = [[1, 1], [1, 0]]; A = [[2, 0], [0, 1]] has A A^T - I = [[3, 0], [0, 0]]."""
    same(orthogonality([BY_HAND]), 3.0 + 9.0, "orthogonality([layer]): 1 + 1 + 1 for B, and 9 for A")


@about("orthogonality", "9")
def test_it_is_0_for_orthonormal_triplets_and_r_for_b_0():
    layer = dict(d=6, k=5, r=3, B=torch.eye(6)[:, :3], A=torch.eye(5)[2:])
    same(orthogonality([layer]), 0.0, "orthogonality([layer]) with orthonormal columns of B and rows of A")
    layer = dict(layer, B=torch.zeros(6, 3))
    same(orthogonality([layer]), 3.0, "orthogonality([layer]) with r = 3 and B = 0: the norm of -I, squared")


@about("orthogonality", "9")
def test_it_is_a_sum_over_layers_of_any_shapes():
    layers = [BY_HAND, dict(d=7, k=3, r=1, B=torch.zeros(7, 1), A=f64([[1.0, 1.0, 1.0]]))]
    same(orthogonality(layers), 12.0 + 1.0 + 4.0, "orthogonality([layer, other])")
    same(orthogonality(layers, "iterator"), 17.0, "orthogonality(iter([layer, other])): any iterable")
    same(orthogonality(layers, "dict"), 17.0, "orthogonality({name: layer}): also what salora_layers returns")


@about("orthogonality", "9")
def test_pruned_triplets_are_no_longer_counted():
    layer = dict(d=6, k=5, r=3, B=torch.eye(6)[:, :3], A=torch.eye(5)[2:], gates=[1.0, 0.0, 1.0], pruned=True)
    same(orthogonality([layer]), 0.0, "orthogonality([layer]), orthonormal, one of three triplets pruned: I is 2 x 2")


@about("orthogonality", "9")
def test_its_gradient_is_4_b_times_gram_minus_identity():
    found = learned(orthogonality_gradients([BY_HAND]), "orthogonality([layer])", "A and B")
    same(found[0], [[4.0, 4.0], [8.0, 4.0]], "the gradient for B = [[1, 0], [1, 1]]: 4 B (B^T B - I)")
    same(found[1], [[24.0, 0.0], [0.0, 0.0]], "the gradient for A = [[2, 0], [0, 1]]: 4 (A A^T - I) A")


@about("canonicalize", "canonical")
def test_columns_of_b_and_rows_of_a_become_orthogonal_and_share_the_singular_values():
    singular = torch.diag(torch.linalg.svdvals(product(SIZES))[:3])
    after = canonicalized(SIZES)
    same(after["B"].T @ after["B"], singular, f"B^T B after {CALL}: the singular values, largest first", within=1e-8)
    same(after["A"] @ after["A"].T, singular, f"A A^T after {CALL}: the singular values, largest first", within=1e-8)


@about("canonicalize", "canonical")
def test_the_product_does_not_change_when_the_triplets_do():
    after = canonicalized(SIZES)
    gram = after["B"].T @ after["B"]
    same(gram, torch.diag(gram.diagonal()), f"B^T B after {CALL}: 0 off the diagonal", within=1e-8)
    same(after["B"] @ after["A"], product(SIZES), f"B A after {CALL}", within=1e-9)


@about("canonicalize", "canonical")
def test_more_triplets_than_the_matrix_has_rank_leave_empty_ones():
    layer = dict(d=2, k=5, r=4)
    after = canonicalized(layer)
    same(list(after["B"].shape), [2, 4], f"the shape of B after {CALL}")
    same(after["B"] @ after["A"], product(layer), f"B A after {CALL}, with r = 4 and d = 2", within=1e-9)
    same(after["A"][2:].norm() + after["B"][:, 2:].norm(), 0.0, f"triplets 2 and 3 after {CALL}, with d = 2")


@about("canonicalize", "canonical")
def test_an_optimizer_that_was_made_before_still_trains_a_and_b():
    after = canonicalized(SIZES)
    gram = after["B"].T @ after["B"]
    same(gram, torch.diag(gram.diagonal()), f"B^T B after {CALL}: 0 off the diagonal", within=1e-8)
    for name in ("B", "A"):
        words = f"{name} after {CALL} and a step that halves it: change the Parameter in place, the optimizer holds it"
        same(after[f"{name} halved"], after[name] / 2, words)


@about("canonicalize", "canonical")
def test_a_layer_whose_b_is_0_stays_as_it_is_and_others_do_not():
    singular = torch.diag(torch.linalg.svdvals(product(SIZES))[:3])
    after = canonicalized(SIZES)
    same(after["A"] @ after["A"].T, singular, f"A A^T after {CALL}: the singular values, largest first", within=1e-8)
    layer = dict(SIZES, B=torch.zeros(5, 3))
    after = canonicalized(layer)
    words = f"A after {CALL} with B = 0: an untrained layer must not lose its A"
    same(after["A"], layer_of(**layer).A, words)
    same(after["B"], torch.zeros(5, 3), f"B after {CALL} with B = 0")
