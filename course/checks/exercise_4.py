"""Exercise 4: SaLoRALinear.forward and .delta, Eq. (5)."""

from course.checking import about, f64, learned, numbers, same
from course.questions import delta, forward, forward_gradients, layer_of
from hard_concrete import sample_gate

FORWARD = "SaLoRALinear.forward"
DELTA = "SaLoRALinear.delta"
SIZES = dict(d=4, k=3, r=2)  # alpha / r0 = 8

# d = k = 2, one triplet, W = 0: A = [1, 2], B = [3, 4], gate 1/2, alpha / r0 = 2
BY_HAND = dict(d=2, k=2, r=1, alpha=2, gates=[0.5], weight=f64([[0.0, 0.0]] * 2), bias=f64([0.0, 0.0]),
               A=f64([[1.0, 2.0]]), B=f64([[3.0], [4.0]]))  # fmt: skip


def update(layer, x, g, scale):
    """scale B diag(g) A x, row by row."""
    return scale * (x @ layer.A.T * g) @ layer.B.T


@about(FORWARD, "5")
def test_one_triplet_by_hand():
    x = f64([[1.0, 1.0]])
    same(forward(BY_HAND, x), [[9.0, 12.0]], "x = [1, 1]: A x = 3, times 2 x 1/2 is 3, times B = [3, 4]")


@about(FORWARD, "5")
def test_closed_gates_leave_the_frozen_layer():
    layer, x = dict(SIZES, gates=[0.0, 0.0]), numbers(5, 3)
    same(forward(layer, x), layer_of(**layer).base(x), "layer(x) with all gates 0: W x and the bias")


@about(FORWARD, "3")
def test_open_gates_are_plain_lora():
    layer, x = dict(SIZES, gates=[1.0, 1.0]), numbers(5, 3)
    ours = layer_of(**layer)
    same(forward(layer, x), ours.base(x) + update(ours, x, 1.0, 8), "layer(x) with all gates 1, alpha / r0 = 8")


@about(FORWARD, "5")
def test_each_gate_multiplies_its_own_triplet():
    layer, x = dict(d=4, k=3, r=3, alpha=3, gates=[1.0, 0.25, 0.0]), numbers(5, 3)
    ours = layer_of(**layer)
    first, second = (x @ ours.A[i, :, None] * ours.B[:, i] for i in (0, 1))
    expected = ours.base(x) + first + second / 4
    same(forward(layer, x), expected, "layer(x) with gates [1, 1/4, 0] and alpha / r0 = 1")


@about(FORWARD, "5")
def test_gates_are_sampled_in_train_mode_and_are_their_medians_in_eval_mode():
    x, noise = numbers(5, 3), [0.3, 0.8]
    for training, u, words in (
        (True, noise, "train mode: self.gate() with the noise of the layer, the same for every row of the batch"),
        (False, [0.5, 0.5], "eval mode: gates at their medians"),
    ):
        layer = dict(SIZES, alpha=2, u=noise, training=training)
        ours = layer_of(**layer)
        expected = ours.base(x) + update(ours, x, sample_gate(ours.gate.log_theta, f64(u)), 1)
        same(forward(layer, x), expected, f"layer(x) in {words}")


@about(FORWARD, "5")
def test_what_stays_after_pruning_keeps_its_scale():
    layer, x = dict(SIZES, alpha=2, gates=[1.0, 0.0], pruned=True), numbers(5, 3)
    ours = layer_of(**layer)
    words = "layer(x), alpha = 2, one of two triplets pruned: the scale is 2 / 2, for r0 is still 2"
    same(forward(layer, x), ours.base(x) + update(ours, x, 1.0, 1), words)
    layer = dict(SIZES, gates=[0.0, 0.0], pruned=True)
    same(forward(layer, x), layer_of(**layer).base(x), "layer(x) with both triplets pruned")


@about(FORWARD, "5")
def test_axes_before_the_last_are_free():
    x = numbers(2, 5, 3)
    ours = layer_of(**SIZES)
    expected = ours.base(x) + update(ours, x, 0.5, 8)
    same(forward(SIZES, x), expected, "layer(x) for x of shape (2, 5, 3)")
    same(forward(SIZES, x[0, 0]), expected[0, 0], "layer(x) for x of shape (3,)")


@about(FORWARD, "5")
def test_gradients_reach_a_b_and_log_theta():
    x, ours = numbers(5, 3), layer_of(**SIZES)
    y = ours.base(x) + update(ours, x, ours.gate(), 8)
    (y * y).sum().backward()
    expected = {"A": ours.A.grad, "B": ours.B.grad, "log_theta": ours.gate.log_theta.grad}
    found = learned(forward_gradients(SIZES, x), "layer(x)", "A, B and log_theta")
    for got, (name, gradient) in zip(found, expected.items()):
        same(got, gradient, f"the gradient of the sum of all squared outputs by {name}")


@about(DELTA, "5")
def test_the_update_as_a_matrix_by_hand():
    same(delta(BY_HAND), [[3.0, 6.0], [4.0, 8.0]], "delta(): 2 x 1/2 times [3, 4] by [1, 2]")


@about(DELTA, "merge")
def test_the_update_as_a_matrix_does_what_the_layer_does_in_eval_mode():
    for training in (False, True):
        layer = dict(d=4, k=3, r=3, log_theta=[-0.5, 0.0, 0.5], u=[0.9, 0.9, 0.9], training=training)
        ours = layer_of(**layer)
        medians = sample_gate(ours.gate.log_theta, f64([0.5, 0.5, 0.5]))
        mode = "train mode: a merged weight has no noise" if training else "eval mode"
        same(delta(layer), 16 / 3 * (ours.B * medians) @ ours.A, f"delta() of a (4, 3) layer in {mode}")


@about(DELTA, "merge")
def test_the_update_keeps_its_scale_after_pruning():
    layer = dict(SIZES, alpha=2, gates=[1.0, 0.0], pruned=True)
    ours = layer_of(**layer)
    same(delta(layer), ours.B @ ours.A, "delta(), alpha = 2, one of two triplets pruned: the scale is 2 / 2")
