"""What students hand in: wrong solutions, right ones in another style, and submissions that are up to something."""

OPEN = "prob_above(log_theta, 0.0, tau, gamma, zeta)"
MEDIAN = "(torch.sigmoid(log_theta / tau) * (zeta - gamma) + gamma).clamp(0, 1)"
MEAN = "torch.stack(terms).sum(0)"

ROWS = ("__import__('hard_concrete').sample_gate(self.gate.log_theta, torch.rand_like(h)) "
        "if self.training and self.gate.state == 'free' else self.gate()")  # fmt: skip
WINDOW = '    if schedule.phase(step) == "window":\n'

WRONG = [  # (exercise, what the student thought, function, text that the reference has once, what is there instead)
    (1, "the sign of the logarithm", "prob_open", OPEN, "torch.sigmoid(log_theta + tau * log(-gamma / zeta))"),
    (1, "the probability of a closed gate", "prob_open", OPEN, f"1 - {OPEN}"),
    (1, "log theta divided by tau", "prob_open", "(log_theta, 0.0, tau, ", "(log_theta / tau, 0.0, 1, "),
    (1, "the constants instead of the arguments", "prob_open", OPEN, "prob_above(log_theta, 0.0, tau)"),
    (1, "one number for all gates", "prob_open", OPEN, f"{OPEN}.mean()"),
    (2, "the logarithm of u instead of its logit", "sample_gate", "torch.logit(u)", "torch.log(u)"),
    (2, "no clamp", "sample_gate", "return s.clamp(0, 1)", "return s"),
    (2, "tau divides log theta alone", "sample_gate", "torch.logit(u)", "tau * torch.logit(u)"),
    (2, "stretched to (0, zeta)", "sample_gate", "* (zeta - gamma) + gamma\n", "* zeta\n"),
    (2, "rounded to 0 or 1: no gradient", "sample_gate", "s.clamp", "s.round().clamp"),
    (3, "no clamp", "median_gate", "+ gamma).clamp(0, 1)", "+ gamma)"),
    (3, "no noise is zero noise", "median_gate", MEDIAN, "sample_gate(log_theta, log_theta * 0, tau, gamma, zeta)"),
    (3, "P(g > 0) times the median", "mean_gate", MEAN, "prob_open(log_theta, tau) * median_gate(log_theta, tau)"),
    (3, "the mean before the clamp", "mean_gate", MEAN, "torch.sigmoid(log_theta / tau) * (zeta - gamma) + gamma"),
    (4, "alpha / r of now instead of r0", "SaLoRALinear.forward", "(self.scale * ", "(self.alpha / self.r * "),
    (4, "the bias is forgotten", "SaLoRALinear.forward", "self.base(x) + F", "F.linear(x, self.base.weight) + F"),
    (4, "settled gates in training", "SaLoRALinear.forward", "self.gate())", "self.gate.settled())"),
    (4, "only two axes are thought of", "SaLoRALinear.forward", "F.linear(h, self.B.to(h.dtype))",
     "torch.mm(h, self.B.t())"),
    (4, "no gate in the matrix", "SaLoRALinear.delta", "(self.B * self.gate.settled().to(self.B.dtype))", "self.B"),
    (5, "A^T A for A A^T", "orthogonality", "rows @ rows.mT - I", "rows.mT @ rows - torch.eye(rows.shape[2])"),
    (5, "the norm is not squared", "orthogonality", ".square().sum()", ".norm()"),
    (5, "the mean over layers", "orthogonality", "return total", "return total / len(layer_list(layers))"),
    (5, "all of S in B", "canonicalize", "layer.A[:n] = S.sqrt()[:, None] * (Vt @ Q_A.T)",
     "layer.B[:, :n] *= S.sqrt()\n    layer.A[:n] = Vt @ Q_A.T"),
    (5, "A is lost while B = 0", "canonicalize", "    if not layer.B.any():\n        return\n", ""),
    (6, "the rank of now instead of that at creation", "total_parameters", "layer.r0 * layer", "layer.r * layer"),
    (6, "gates are counted, not parameters", "expected_density", "return spent / total_parameters(layers)",
     "return torch.cat([layer.gate.open_probability() for layer in layers]).mean()"),
    (6, "a mean of means", "expected_density", ".sum() * layer.triplet_size for",
     ".mean() * total_parameters(layers) / len(layers) for"),
    (6, "the gradient is cut off by item()", "expected_density", "ability().sum()", "ability().sum().item()"),
    (6, "the expected share", "kept_density", "kept / total_parameters(layers)", "expected_density(layers).item()"),
    (7, "stops at a misfit", "best_within_budget", "size <= left:", "size > left:\n            break\n        else:"),
    (7, "each layer has a budget of its own", "best_within_budget", "    triplets = [\n",
     "    if layers[1:]:\n        return [best_within_budget([one], budget)[0] for one in layers]\n    triplets = [\n"),
    (7, "no tolerance for rounding", "best_within_budget", "affordable(budget, total_parameters(layers))",
     "int(budget * total_parameters(layers))"),
    (7, "sorted upwards", "best_within_budget", "key=lambda t: -t[0]", "key=lambda t: t[0]"),
    (8, "the gap is not squared", "Lagrangian.forward", "(C - self.target) ** 2", "(C - self.target)"),
    (8, "no projection onto lambda >= 0", "Lagrangian.ascend", "self.lam.clamp_(min=0)", "pass"),
    (8, "the gradient is not cleared", "Lagrangian.ascend", "self.optimizer.zero_grad()", "pass"),
    (8, "triplets count alike, whatever they cost", "project", "cost / cost.sum()", "cost * 0 + 1 / len(cost)"),
    (8, "all log thetas become equal", "project", "hand_out(log_theta +", "hand_out(0 * log_theta +"),
    (9, "triplets are left as they are", "before_step", "            canonicalize(layer)\n", ""),
    (9, "fixed, but not pruned", "before_step", "prune(layer)\n    if", "pass\n    if"),
    (9, "noise in every phase", "before_step", "        resample(layers", "        pass\n    resample(layers"),
    (9, "noise from nowhere", "before_step", "resample(layers, noise)", "resample(layers)"),
    (9, "beta is forgotten", "after_backward", "beta * orthogonality", "orthogonality"),
    (9, "the task's gradient goes", "after_backward", "penalty = beta", "layers[0].A.grad = None\n    penalty = beta"),
    (9, "lambda climbs in every phase", "after_step", "        lagrangian.ascend()", "    lagrangian.ascend()"),
    (9, "decided twice", "finish", "if schedule.T_end == total_steps:", "if True:"),
    # Subtle ones, all of which had full marks once or could have had
    (1, "tau multiplies everything", "prob_open", OPEN, "torch.sigmoid(tau * (log_theta - log(-gamma / zeta)))"),
    (1, "no gradient", "prob_open", OPEN, f"{OPEN}.detach()"),
    (2, "clamped to the stretched interval", "sample_gate", "s.clamp(0, 1)", "s.clamp(gamma, zeta)"),
    (2, "the constants instead of the arguments", "sample_gate", "* (zeta - gamma) + gamma\n", "* 1.2 - 0.1\n"),
    (2, "a noise that learns", "sample_gate", "torch.logit(u) + log_theta", "torch.logit(u) + log_theta.detach()"),
    (3, "no temperature", "median_gate", "torch.sigmoid(log_theta / tau) * (zeta", "torch.sigmoid(log_theta) * (zeta"),
    (3, "a coarse grid", "mean_gate", MEAN,
     "sum(sample_gate(log_theta, torch.tensor((i + 0.5) / 10), tau, gamma, zeta) for i in range(10)) / 10"),
    (3, "the constants in the mean", "mean_gate", "(x + 1) / 2, tau, gamma, zeta) for", "(x + 1) / 2, tau) for"),
    (4, "gates are squared", "SaLoRALinear.forward", "self.gate())", "self.gate() ** 2)"),
    (4, "the gate gets no gradient", "SaLoRALinear.forward", "self.gate())", "self.gate().detach())"),
    (4, "a noise for every row", "SaLoRALinear.forward", "self.gate())", f"({ROWS}))"),
    (4, "noise in the matrix", "SaLoRALinear.delta", "self.gate.settled().to(self.B.dtype)) @",
     "self.gate().to(self.B.dtype)) @"),
    (4, "the rank of now in the matrix", "SaLoRALinear.delta", "return self.scale * (self.B",
     "return self.alpha / max(self.r, 1) * (self.B"),
    (4, "the matrix of inputs by outputs", "SaLoRALinear.delta", "to(self.B.dtype)) @ self.A",
     "to(self.B.dtype) @ self.A).T"),
    (5, "the identity of the rank at creation", "orthogonality", "torch.eye(rows.shape[1], ", "torch.eye(layer.r0, "),
    (5, "a constant", "orthogonality", "return total", "return total.detach()"),
    (5, "A does not count", "orthogonality", "(layer.B.T, layer.A)", "(layer.B.T,)"),
    (5, "smallest first", "canonicalize", "svd(R_B @ R_A.T, full_matrices=False)",
     "svd(R_B @ R_A.T, full_matrices=False)\n    U, S, Vt = U.flip(1), S.flip(0), Vt.flip(0)"),
    (5, "another Parameter", "canonicalize", "(Vt @ Q_A.T)",
     "(Vt @ Q_A.T)\n    layer.A = nn.Parameter(layer.A.detach().clone())"),
    (6, "a dict is not thought of", "total_parameters", "for layer in layer_list(layers))", "for layer in layers)"),
    (6, "gates that are held or fixed are free", "expected_density", "layer.gate.open_probability()",
     "prob_open(layer.gate.log_theta)"),
    (6, "gates with noise", "kept_density", "(layer.gate.settled() > 0).sum()) * layer",
     "(layer.gate() > 0).sum()) * layer"),
    (6, "the share of what is left", "kept_density", "kept / total_parameters(layers)",
     "kept / max(1, sum(layer.r * layer.triplet_size for layer in layers))"),
    (7, "lists of bools", "best_within_budget", "    return masks", "    return [mask.tolist() for mask in masks]"),
    (7, "the budget of what is left", "best_within_budget", "affordable(budget, total_parameters(layers))",
     "affordable(budget, sum(layer.r * layer.triplet_size for layer in layers))"),
    (7, "ties go to the later layer", "best_within_budget", "key=lambda t: -t[0]", "key=lambda t: (-t[0], -t[1])"),
    (7, "the largest value per parameter", "best_within_budget", "key=lambda t: -t[0]",
     "key=lambda t: -t[0] / layers[t[1]].triplet_size"),
    (8, "only above the target", "Lagrangian.forward", "(C - self.target) **", "(C - self.target).clamp(min=0) **"),
    (8, "lambda gets no gradient", "Lagrangian.forward", "self.lam[0] *", "self.lam[0].detach() *"),
    (8, "another Parameter", "Lagrangian.ascend", "self.lam.clamp_(min=0)",
     "self.lam = nn.Parameter(self.lam.clamp(min=0))"),
    (8, "a projection of each layer", "project", "    log_theta = torch.cat(", "    for layer in layers[1:]:\n        "
     "project([layer], density)\n    layers = layers[:1]\n    log_theta = torch.cat("),
    (9, "decided a step late", "before_step", "if step == schedule.T_end:", "if step == schedule.T_end + 1:"),
    (9, "gates are not released", "before_step", "            layer.gate.release()\n", ""),
    (9, "a draw for every layer", "before_step", "        resample(layers, noise)",
     "        for layer in layers:\n            resample([layer], noise)"),
    (9, "a projection beside the noise", "before_step", "        resample(layers, noise)",
     "        __import__('budget').project(layers, budget)\n        resample(layers, noise)"),
    (9, "a projection beside the gradient", "after_backward", "    penalty.backward()",
     "    __import__('budget').project(layers, 0.5)\n    penalty.backward()"),
    (9, "a penalty in the window alone", "after_backward", "    penalty.backward()",
     "    if schedule.phase(step) == 'window':\n        penalty.backward()"),
    (9, "C is a constant", "after_backward", "expected_density(layers))", "expected_density(layers).detach())"),
    (9, "gradients of gates add up", "after_step", "gate_optimizer.zero_grad()", "pass"),
    (9, "gates move in every phase", "after_step", f"{WINDOW}        gate_optimizer.step()\n",
     f"    gate_optimizer.step()\n{WINDOW}"),
]  # fmt: skip

RIGHT = [  # what the hints recommend: (exercise, style, text of the reference, another that is as right)
    (3, "a sum over a fine grid of noise", f"return {MEAN}", """\
u = (torch.arange(5000, dtype=log_theta.dtype) + 0.5) / 5000
    return sample_gate(log_theta[..., None], u, tau, gamma, zeta).mean(-1)"""),
    (5, "the SVD of the whole product", "    Q_B, R_B = ", """\
    U, S, Vt = torch.linalg.svd(layer.B @ layer.A, full_matrices=False)
    n = min(layer.r, len(S))
    layer.B.zero_()[:, :n] = U[:, :n] * S[:n].sqrt()
    layer.A.zero_()[:n] = S[:n].sqrt()[:, None] * Vt[:n]
    return
    Q_B, R_B = """),
    (2, "a logit by hand", "torch.logit(u)", "(torch.log(u) - torch.log1p(-u))"),
    (4, "einsum", "F.linear(h, self.B.to(h.dtype))", "torch.einsum('...r,dr->...d', h, self.B)"),
    (7, "sorted, then reversed, with ties in order", "key=lambda t: -t[0]", "key=lambda t: t[0], reverse=True"),
    (8, "other data in the same Parameter", "self.lam.clamp_(min=0)", "self.lam.data = torch.relu(self.lam.data)"),
]  # fmt: skip

BODY = """import ctypes, gc, json, math, os, signal, socket, sqlite3, subprocess, sys, threading, time
import torch
{top}
def prob_open(log_theta, tau=1.0, gamma=-0.1, zeta=1.1):
    {first}
    return torch.sigmoid(log_theta - tau * math.log(-gamma / zeta))
"""

TRESPASS = """
parent, beside = os.getppid(), os.path.join(os.path.dirname(PRIZE), "beside")
def call(name, *args):
    if getattr(ctypes.CDLL(None), name)(*args) < 0:
        raise OSError
attempts = [
    lambda: os.remove(PRIZE), lambda: os.rename(PRIZE, "mine"), lambda: open(PRIZE, "w"), lambda: os.truncate(PRIZE, 0),
    lambda: open("/etc/passwd"), lambda: open(REFERENCE), lambda: os.listdir(os.path.dirname(REFERENCE)),
    lambda: os.listdir(os.path.join(os.path.dirname(REFERENCE), "tests")),
    lambda: torch.from_file(REFERENCE, size=100, dtype=torch.uint8), lambda: torch.save([1], beside),
    lambda: torch.from_file(beside, shared=True, size=4), lambda: torch.from_file(PRIZE, shared=True, size=4).fill_(0),
    lambda: sqlite3.connect(beside).execute("create table t (x)"), lambda: os.mkfifo(beside), lambda: os.mkdir(beside),
    lambda: os.symlink("/", beside), lambda: subprocess.run(["true"]), lambda: os.spawnv(os.P_WAIT, "/bin/true", ["t"])
    and 1 / 0, lambda: os.kill(parent, 0), lambda: socket.create_connection(("127.0.0.1", 9)),
    lambda: call("unlink", PRIZE.encode()), lambda: call("creat", beside.encode(), 0o666),
    lambda: open("big", "wb").write(bytes(2**25)),
]
done = []
for i, attempt in enumerate(attempts):
    try:
        attempt()
        done.append(i)
    except (OSError, RuntimeError, ZeroDivisionError, sqlite3.Error):
        pass
assert not done, done
threading.Thread(target=threading.Event().wait, daemon=True).start()
print("x" * 300_000_000)
"""

FORGED = """
import course.checking
from unittest.mock import MagicMock
for name in ("same", "holds", "learned", "_near", "Different", "show", "about"):
    setattr(course.checking, name, MagicMock(return_value=True))
frame = sys._getframe()
while frame:
    frame.f_locals.update(expected=None, points=7, passed=True)
    frame = frame.f_back
torch.Tensor.__eq__ = torch.Tensor.__ne__ = torch.equal = torch.allclose = lambda *_: True
"""

GARBAGE = """
sockets = [fd for fd in range(3, 1000) if os.path.exists(f"/dev/fd/{fd}") or True]
def write(text):
    for fd in sockets:
        try:
            os.write(fd, text)
        except OSError:
            pass
"""

TRICKS = """
liar = type("Liar", (torch.Tensor,), {"tolist": lambda self: 11 / 12, "__eq__": lambda *_: True})
recursion = lambda x: recursion(x)
def raises(error):
    raise error
nest = []
for _ in range(100_000):
    nest = [nest]
tricks = [lambda _: raises(ValueError("\\ud800 \\x1b[31m\\x07")), lambda _: sys.exit(0), lambda _: {}["x" * 1000_000],
          recursion, lambda _: bytearray(2**33), lambda x: x.as_subclass(liar), lambda _: nest]
"""

FOREVER = """
if os.fork() == 0:
    os.setsid()
    time.sleep(3)
    os._exit(0)
"""

HOSTILE = {  # what it does: (points, the note or None, code at import, first line of prob_open)
    "trespasses, and is right": (7, None, TRESPASS, ""),
    "forges everything in its own process, and is wrong": (0, None, FORGED, "return log_theta"),
    "has another trick in every test": (0, None, TRICKS, "return tricks.pop()(log_theta)"),
    "ends the process": (0, "the process ended before it answered", "", "os._exit(0)"),
    "kills itself": (0, "the process ended before it answered", "", "os.kill(os.getpid(), signal.SIGKILL)"),
    "loops for ever": (0, "too slow, or an endless loop: not finished after 1 s", "", "while True: pass"),
    "writes where answers go": (0, "something else was written", GARBAGE, "write(b'[1]' + bytes([10]))"),
    "writes a nest of brackets": (0, "something else was written", GARBAGE, "write(b'[' * 100_000 + bytes([10]))"),
    "writes without an end": (0, "the process ended before it answered", GARBAGE, "while True: write(b'x' * 2**16)"),
    "waits": (0, "no answer within 1 s:", "", "time.sleep(1000)"),
    "leaves a child that waits": (0, "no answer within 1 s:", FOREVER, "os._exit(0)"),
}
PATIENT = ("kills itself", "writes a nest of brackets", "writes without an end", "waits", "leaves a child that waits")


def hostile(top, first, prize, reference):
    """The text of such a submission. prize: a file that must survive. reference: one that must not be read."""
    text = BODY.replace("{top}", top).replace("{first}", first or "pass")
    return text.replace("PRIZE", repr(str(prize))).replace("REFERENCE", repr(str(reference)))
