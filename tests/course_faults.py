"""What students hand in: wrong solutions, right ones in another style, and submissions that are up to something."""

OPEN = "prob_above(log_theta, 0.0, tau, gamma, zeta)"
MEDIAN = "(torch.sigmoid(log_theta / tau) * (zeta - gamma) + gamma).clamp(0, 1)"
MEAN = "torch.stack(terms).sum(0)"

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
    (5, "A^T A for A A^T", "orthogonality", "A @ layer.A.T - I", "A.T @ layer.A - torch.eye(len(layer.A.T))"),
    (5, "the norm is not squared", "orthogonality", "layer.B - I).square().sum()", "layer.B - I).norm()"),
    (5, "the mean over layers", "orthogonality", "return total", "return total / len(layer_list(layers))"),
    (5, "all of S in B", "canonicalize", "layer.A.zero_()[:n] = S.sqrt()[:, None] * (Vt @ Qa.T)",
     "layer.B[:, :n] *= S.sqrt()\n    layer.A.zero_()[:n] = Vt @ Qa.T"),
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
    (8, "all log thetas become equal", "project", "layer.gate.log_theta += ", "layer.gate.log_theta[:] = "),
    (9, "triplets are left as they are", "before_step", "            canonicalize(layer)\n", ""),
    (9, "fixed, but not pruned", "before_step", "prune(layer)\n    if", "pass\n    if"),
    (9, "noise in every phase", "before_step", "        resample(layers", "        pass\n    resample(layers"),
    (9, "noise from nowhere", "before_step", "resample(layers, noise)", "resample(layers)"),
    (9, "beta is forgotten", "after_backward", "beta * orthogonality", "orthogonality"),
    (9, "the task's gradient goes", "after_backward", "penalty = beta", "layers[0].A.grad = None\n    penalty = beta"),
    (9, "lambda climbs in every phase", "after_step", "        lagrangian.ascend()", "    lagrangian.ascend()"),
    (9, "decided twice", "finish", "if schedule.T_end == total_steps:", "if True:"),
]  # fmt: skip

RIGHT = [  # what the hints recommend: (exercise, style, text of the reference, another that is as right)
    (3, "a sum over a fine grid of noise", f"return {MEAN}", """\
u = (torch.arange(5000, dtype=log_theta.dtype) + 0.5) / 5000
    return sample_gate(log_theta[..., None], u, tau, gamma, zeta).mean(-1)"""),
    (5, "the SVD of the whole product", "    (Qb, Rb), (Qa, Ra) = ", """\
    U, S, Vt = torch.linalg.svd(layer.B @ layer.A, full_matrices=False)
    n = min(layer.r, len(S))
    layer.B.zero_()[:, :n] = U[:, :n] * S[:n].sqrt()
    layer.A.zero_()[:n] = S[:n].sqrt()[:, None] * Vt[:n]
    return
    (Qb, Rb), (Qa, Ra) = """),
]  # fmt: skip

BODY = """import builtins, ctypes, math, os, shutil, socket, subprocess, sys, threading
import course.checking, pytest, torch
{top}
def prob_open(log_theta, tau=1.0, gamma=-0.1, zeta=1.1):
    {first}
    return torch.sigmoid(log_theta - tau * math.log(-gamma / zeta))
"""

FORBIDDEN = """
for attempt in (
    lambda: os.remove(PRIZE), lambda: shutil.rmtree(os.path.dirname(PRIZE)), lambda: os.rename(PRIZE, "mine"),
    lambda: open(PRIZE, "w"), lambda: open("/etc/passwd"), lambda: course.graft.reference_texts(),
    lambda: subprocess.run(["true"]), lambda: os.system("true"), lambda: os.fork() or os._exit(0),
    lambda: os.kill(os.getppid(), 0), lambda: ctypes.CDLL(None), lambda: socket.create_connection(("127.0.0.1", 9)),
    lambda: threading.Thread(target=threading.Event().wait).start(), lambda: print("x" * 300_000_000),
    lambda: open("big", "wb").write(bytes(2**25)),
):
    try:
        attempt()
    except OSError:
        pass
"""
REFUSED = "ctypes os.fork os.kill os.remove os.rename os.system read read shutil.rmtree socket subprocess write".split()

REPLACED = """
course.checking.same.__code__ = (lambda *a, **k: None).__code__
torch.Tensor.tolist = lambda x: [0.0]
torch.as_tensor = lambda x: torch.zeros(1)
builtins.all = lambda x: True
"""
CHANGED = "builtins.all, course.checking.same, torch.Tensor.tolist, torch.as_tensor"

TRICKS = """
liar = type("Liar", (torch.Tensor,), {"tolist": lambda self: 11 / 12})
recursion = lambda x: recursion(x)
tricks = [lambda _: pytest.skip(), lambda _: pytest.xfail(), lambda _: sys.exit(0), lambda _: {}["x" * 1000_000],
          recursion, lambda _: [bytearray(2**30) for _ in range(1000)], lambda x: x.as_subclass(liar)]
"""

HOSTILE = {  # what it does: (points, what each note says, code at import, first line of prob_open)
    "tries whatever it should not, and is right": (7, REFUSED, FORBIDDEN, ""),
    "replaces functions of the checks, torch and Python": (0, [CHANGED], REPLACED, "return log_theta"),
    "has another trick in every test": (0, [], TRICKS, "return tricks.pop()(log_theta)"),
    "ends the process": (0, ["ended before"], "", "os._exit(0)"),
    "asks pytest to stop": (0, ["ended before"], "", "pytest.exit('done', 0)"),
    "never comes to an end": (0, ["not finished after"], "", "while True: print('x' * 1000_000)"),
}


def hostile(top, first, prize):
    """The text of such a submission. prize: the path of a file that must survive."""
    return BODY.replace("{top}", top).replace("{first}", first or "pass").replace("PRIZE", repr(str(prize)))
