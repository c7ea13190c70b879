"""What students hand in: wrong solutions, right ones in another style, and submissions that are up to something.

python tests/course_faults.py        the table of wrong solutions as Markdown: tests lost, and who is blamed
"""

import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

HARD, SALORA, BUDGET, LOOP = "hard_concrete.py", "salora.py", "budget.py", "course/bare_loop.py"
OPEN = "return prob_above(log_theta, 0.0, tau, gamma, zeta)"
SAMPLE = "s = torch.sigmoid((torch.logit(u) + log_theta) / tau) * (zeta - gamma) + gamma\n    return s.clamp(0, 1)"
MEAN = "return torch.stack(terms).sum(0)"
GATED = "h = h * (self.scale * self.gate()).to(h.dtype)"
UPDATE = "return self.base(x) + F.linear(h, self.B)"
COUNTED = "spent = sum(layer.gate.open_probability().sum() * layer.triplet_size for layer in layers)\n"
SHIFTED = "        layer.gate.log_theta += (low + high) / 2"
PENALTY = "penalty = beta * orthogonality(layers)  # Eq. (9)"

WRONG = [  # (exercise, what the student thought, function, file, text of the reference, what stands there instead)
    (1, "the sign of the logarithm", "prob_open", HARD, OPEN,
     "return torch.sigmoid(log_theta + tau * log(-gamma / zeta))"),
    (1, "the probability of a closed gate", "prob_open", HARD, OPEN,
     "return 1 - torch.sigmoid(log_theta - tau * log(-gamma / zeta))"),
    (1, "log theta divided by tau, as in Eq. (7)", "prob_open", HARD, OPEN,
     "return torch.sigmoid(log_theta / tau - log(-gamma / zeta))"),
    (1, "the constants instead of the arguments", "prob_open", HARD, OPEN,
     "return torch.sigmoid(log_theta - tau * log(-GAMMA / ZETA))"),
    (1, "one number for all gates", "prob_open", HARD, OPEN,
     "return torch.sigmoid(log_theta - tau * log(-gamma / zeta)).mean()"),
    (2, "the logarithm of u instead of its logit", "sample_gate", HARD, SAMPLE,
     SAMPLE.replace("logit", "log")),
    (2, "no clamp", "sample_gate", HARD, SAMPLE, SAMPLE.replace(".clamp(0, 1)", "")),
    (2, "tau divides log theta alone", "sample_gate", HARD, SAMPLE,
     SAMPLE.replace("(torch.logit(u) + log_theta) / tau", "torch.logit(u) + log_theta / tau")),
    (2, "stretched to (0, zeta)", "sample_gate", HARD, SAMPLE, SAMPLE.replace("(zeta - gamma) + gamma", "zeta")),
    (2, "rounded to 0 or 1: no gradient", "sample_gate", HARD, SAMPLE, SAMPLE.replace(".clamp", ".round().clamp")),
    (3, "no clamp", "median_gate", HARD, "(zeta - gamma) + gamma).clamp(0, 1)", "(zeta - gamma) + gamma)"),
    (3, "the sample at u = 0: no noise is zero noise", "median_gate", HARD,
     "return (torch.sigmoid(log_theta / tau) * (zeta - gamma) + gamma).clamp(0, 1)",
     "return sample_gate(log_theta, torch.zeros_like(log_theta), tau, gamma, zeta)"),
    (3, "P(g > 0) times the median", "mean_gate", HARD, MEAN,
     "return prob_open(log_theta, tau, gamma, zeta) * median_gate(log_theta, tau, gamma, zeta)"),
    (3, "the mean before the clamp", "mean_gate", HARD, MEAN,
     "return torch.sigmoid(log_theta / tau) * (zeta - gamma) + gamma"),
    (4, "alpha / r of now instead of r0", "SaLoRALinear.forward", SALORA, GATED,
     "h = h * (self.alpha / self.r * self.gate()).to(h.dtype)"),
    (4, "the bias is forgotten", "SaLoRALinear.forward", SALORA, UPDATE,
     "return F.linear(x, self.base.weight) + F.linear(h, self.B)"),
    (4, "settled gates in training", "SaLoRALinear.forward", SALORA, GATED, GATED.replace("gate()", "gate.settled()")),
    (4, "only two axes are thought of", "SaLoRALinear.forward", SALORA, UPDATE,
     "return self.base(x) + torch.mm(h, self.B.t())"),
    (4, "the gate is left out of the matrix", "SaLoRALinear.delta", SALORA,
     "return self.scale * (self.B * self.gate.settled().to(self.B.dtype)) @ self.A",
     "return self.scale * self.B @ self.A"),
    (5, "A^T A instead of A A^T", "orthogonality", SALORA,
     "(layer.A @ layer.A.T - I)", "(layer.A.T @ layer.A - torch.eye(layer.A.shape[1], dtype=I.dtype))"),
    (5, "the norm is not squared", "orthogonality", SALORA,
     "(layer.B.T @ layer.B - I).square().sum()", "(layer.B.T @ layer.B - I).norm()"),
    (5, "the mean over layers", "orthogonality", SALORA,
     "- I).square().sum()\n    return total", "- I).square().sum()\n    return total / len(layer_list(layers))"),
    (5, "all of S in B", "canonicalize", SALORA, "layer.A.zero_()[:n] = S.sqrt()[:, None] * (Vt @ Qa.T)",
     "layer.B[:, :n] *= S.sqrt()\n    layer.A.zero_()[:n] = Vt @ Qa.T"),
    (5, "A is lost while B = 0", "canonicalize", SALORA, "    if not layer.B.any():\n        return\n", ""),
    (6, "the rank of now instead of that at creation", "total_parameters", BUDGET,
     "sum(layer.r0 * layer.triplet_size", "sum(layer.r * layer.triplet_size"),
    (6, "gates are counted, not parameters", "expected_density", BUDGET, COUNTED,
     "return sum(layer.gate.open_probability().sum() for layer in layers) / sum(layer.r0 for layer in layers)\n"),
    (6, "a mean of the layers' ratios", "expected_density", BUDGET, COUNTED,
     "return torch.stack([layer.gate.open_probability().sum() / layer.r0 for layer in layers]).mean()\n"),
    (6, "the gradient is cut off by item()", "expected_density", BUDGET, COUNTED,
     COUNTED.replace("probability().sum()", "probability().sum().item()")),
    (6, "the likely share instead of a count", "kept_density", BUDGET, "kept / total_parameters(layers)",
     "float(expected_density(layers))"),
    (7, "stops at the first that does not fit", "best_within_budget", BUDGET, "            masks[i][j] = True\n",
     "            masks[i][j] = True\n        else:\n            break\n"),
    (7, "each layer has a budget of its own", "best_within_budget", BUDGET, "    triplets = [\n",
     "    for layer, mask in zip(layers, masks):\n"
     "        mask[layer.gate.log_theta.argsort(descending=True)[: floor(density * layer.r0 + 1e-6)]] = True\n"
     "    return masks\n    triplets = [\n"),
    (7, "no tolerance for rounding", "best_within_budget", BUDGET, "total_parameters(layers) + 1e-6)",
     "total_parameters(layers))"),
    (7, "sorted upwards", "best_within_budget", BUDGET, "key=lambda t: -t[0]", "key=lambda t: t[0]"),
    (8, "the gap is not squared", "Lagrangian.forward", BUDGET, "self.lam[0] * (C - self.target) ** 2",
     "self.lam[0] * (C - self.target)"),
    (8, "no projection onto lambda >= 0", "Lagrangian.ascend", BUDGET,
     "            self.lam.clamp_(min=0)", "            pass"),
    (8, "the gradient is not cleared", "Lagrangian.ascend", BUDGET,
     "        self.optimizer.step()\n        self.optimizer.zero_grad()\n", "        self.optimizer.step()\n"),
    (8, "triplets count alike, whatever they cost", "project", BUDGET, "(cost / cost.sum())",
     "(torch.ones_like(cost) / len(cost))"),
    (8, "all log thetas become equal", "project", BUDGET, SHIFTED, SHIFTED.replace("+= ", "[:] = ")),
    (9, "fixed, but not pruned", "before_step", LOOP,
     "        for layer in layers:\n            prune(layer)\n    if schedule.phase", "    if schedule.phase"),
    (9, "noise in every phase", "before_step", LOOP, '    if schedule.phase(step) == "window":\n        resample',
     "    if True:\n        resample"),
    (9, "noise from nowhere", "before_step", LOOP, "resample(layers, noise)", "resample(layers)"),
    (9, "beta is forgotten", "after_backward", LOOP, PENALTY, "penalty = orthogonality(layers)"),
    (9, "gradients cleared before the penalty", "after_backward", LOOP, PENALTY,
     PENALTY + "\n    for layer in layers:\n        layer.A.grad = layer.B.grad = None"),
    (9, "lambda climbs in every phase", "after_step", LOOP, "        lagrangian.ascend()", "    lagrangian.ascend()"),
    (9, "decided twice", "finish", LOOP, "    if schedule.T_end == total_steps:\n", "    if True:\n"),
]  # fmt: skip

RIGHT = [  # (exercise, style, file, text of the reference, another that is as right)
    (1, "odds instead of a sigmoid", HARD, OPEN,
     "odds = torch.exp(log_theta) * (-zeta / gamma) ** tau\n    return odds / (1 + odds)"),
    (2, "written out, a helper of their own, torch.minimum", HARD, SAMPLE,
     "return _squash(((u / (1 - u)).log() + log_theta) / tau, gamma, zeta)\n\n\n"
     "def _squash(x, gamma, zeta):\n    s = gamma + (zeta - gamma) / (1 + (-x).exp())\n"
     "    return torch.minimum(torch.maximum(s, torch.zeros_like(s)), torch.ones_like(s))"),
    (3, "a sum over a fine grid of noise", HARD, MEAN,
     "u = (torch.arange(5000, dtype=log_theta.dtype) + 0.5) / 5000\n"
     "    return sample_gate(log_theta[..., None], u, tau, gamma, zeta).mean(-1)"),
    (4, "einsum, with a method of their own", SALORA,
     "        if self.r == 0:\n            return self.base(x)\n        h = F.linear(x, self.A)",
     "        return self.base(x) + self._update(x)\n\n    def _update(self, x):\n"
     "        g = self.gate().to(x.dtype)\n"
     '        return torch.einsum("...k,rk,r,dr->...d", x, self.A, g, self.B) * self.alpha / self.r0\n'
     "        h = F.linear(x, self.A)"),
    (5, "loops over triplets", SALORA, "    total = 0.0\n    for layer in layer_list(layers):\n",
     "    total = 0.0\n    for layer in layer_list(layers):\n        for i in range(layer.r):\n"
     "            for j in range(layer.r):\n"
     "                total = total + (layer.B[:, i] @ layer.B[:, j] - float(i == j)) ** 2\n"
     "                total = total + (layer.A[i] @ layer.A[j] - float(i == j)) ** 2\n"
     "    return total\n    for layer in layer_list(layers):\n"),
    (5, "the SVD of the whole product", SALORA, "    (Qb, Rb), (Qa, Ra) = ",
     "    U, S, Vt = torch.linalg.svd(layer.B @ layer.A, full_matrices=False)\n    n = min(layer.r, len(S))\n"
     "    layer.B.zero_()\n    layer.A.zero_()\n    layer.B[:, :n] = U[:, :n] * S[:n].sqrt()\n"
     "    layer.A[:n] = S[:n].sqrt()[:, None] * Vt[:n]\n    return\n"
     "    (Qb, Rb), (Qa, Ra) = "),
    (7, "one tensor of all log thetas, a stable sort", BUDGET, "    triplets = [\n",
     "    owner = [(i, j) for i, layer in enumerate(layers) for j in range(layer.r)]\n"
     "    order = torch.cat([layer.gate.log_theta for layer in layers]).argsort(descending=True, stable=True)\n"
     "    for n in order.tolist():\n        i, j = owner[n]\n        if layers[i].triplet_size <= left:\n"
     "            masks[i][j], left = True, left - layers[i].triplet_size\n    return masks\n    triplets = [\n"),
    (8, "bisection", BUDGET, "    grid = torch.linspace(0, 1, GRID, device=log_theta.device)\n",
     "    for _ in range(60):\n        middle = (low + high) / 2\n"
     "        if (prob_open(log_theta + middle) * cost).sum() < density * cost.sum():\n            low = middle\n"
     "        else:\n            high = middle\n"
     "    for layer in layers:\n        layer.gate.log_theta += middle\n    return\n"
     "    grid = torch.linspace(0, 1, GRID, device=log_theta.device)\n"),
]  # fmt: skip


ANSWER = "    return torch.sigmoid(log_theta - tau * math.log(-gamma / zeta))\n"
HEAD = "def prob_open(log_theta, tau=1.0, gamma=-0.1, zeta=1.1):\n"
BODY = "import math\n\nimport torch\n\n{top}\n\n" + HEAD + "{first}{answer}"

HOSTILE = [  # (what it does, points or None for any, a note, code at import, first lines of prob_open)
    ("fails at import", 0, "does not load: line 5: ZeroDivisionError", "1 / 0", ""),
    ("is not Python", 0, "line 5: SyntaxError", "def", ""),
    ("is not text", 0, "null bytes", "\0", ""),
    ("leaves at import", 0, "SystemExit", "raise SystemExit(0)", ""),
    ("ends the process at import", 0, "ended before the tests were done", "import os\nos._exit(0)", ""),
    ("ends the process in the function", 0, "ended before the tests were done", "import os", "    os._exit(0)\n"),
    ("leaves in the function", 0, None, "import sys", "    sys.exit(0)\n"),
    ("interrupts pytest", 0, "ended before the tests were done", "", "    raise KeyboardInterrupt\n"),
    ("asks pytest to stop", 0, "ended before the tests were done", "import pytest", "    pytest.exit('done', 0)\n"),
    ("skips the tests", 0, None, "import pytest", "    pytest.skip()\n"),
    ("declares the failure expected", 0, None, "import pytest", "    pytest.xfail()\n"),
    ("loops at import", 0, "not finished after", "while True:\n    pass", ""),
    ("loops in the function", 0, "not finished after", "", "    while True:\n        pass\n"),
    ("prints without end", 0, "not finished after", "", "    while True:\n        print('x' * 1000_000)\n"),
    ("prints 300 megabytes, and is right", 7, None, "for _ in range(300):\n    print('x' * 1000_000)", ""),
    ("raises an error of a megabyte", 0, None, "", "    raise ValueError('x' * 1000_000)\n"),
    ("calls itself", 0, None, "", "    return prob_open(log_theta)\n"),
    ("takes all memory", 0, None, "", "    return [bytearray(2**30) for _ in range(1000)]\n"),
    ("fills the disk", 0, None, "",
     "    with open('big', 'wb') as file:\n        while True:\n            file.write(bytes(2**20))\n"),
    ("removes a file", 0, "refused: os.remove", "import os\nos.remove(PRIZE)", ""),
    ("removes a folder", 0, "refused: shutil.rmtree", "import os, shutil\nshutil.rmtree(os.path.dirname(PRIZE))", ""),
    ("overwrites a file, and hides the error", None, "refused: write",
     "try:\n    open(PRIZE, 'w')\nexcept OSError:\n    pass", ""),
    ("renames a file", 0, "refused: os.rename", "import os\nos.rename(PRIZE, 'mine')", ""),
    ("runs a program", 0, "refused: subprocess.Popen", "import subprocess\nsubprocess.run(['rm', PRIZE])", ""),
    ("runs a shell", 0, "refused: os.system", "import os\nos.system('rm ' + PRIZE)", ""),
    ("is a fork bomb", 0, "refused: os.fork", "import os\nwhile True:\n    os.fork()", ""),
    ("kills its parent", 0, "refused: os.kill", "import os\nos.kill(os.getppid(), 9)", ""),
    ("kills by way of C", 0, "refused: ctypes", "import ctypes\nctypes.CDLL(None).kill(-1, 9)", ""),
    ("opens a connection", 0, "refused: socket", "import socket\nsocket.create_connection(('127.0.0.1', 9))", ""),
    ("keeps a thread alive, and is right", 7, None,
     "import threading\nthreading.Thread(target=threading.Event().wait).start()", ""),
    ("imports the reference's text", 0, "refused: read",
     "from course.graft import reference_texts\nreference_texts()", ""),
    ("reads the reference", 0, "refused: read",
     "import course\nexec(open(course.__file__.replace('course/__init__', 'hard_concrete')).read())", ""),
    ("reads a file of the machine, and hides the error", None, "refused: read: /etc/passwd",
     "try:\n    open('/etc/passwd')\nexcept OSError:\n    pass", ""),
    ("asks the module that it replaces", 0, None, "import hard_concrete",
     "    return hard_concrete.prob_open(log_theta, tau, gamma, zeta)\n"),
    ("replaces the comparison", 0, "changes code outside the submission: course.checking.same",
     "import course.checking\ncourse.checking.same = lambda *a, **k: None", "    return log_theta\n"),
    ("replaces the inside of the comparison", 0, "changes code outside the submission: course.checking.same",
     "import course.checking\ncourse.checking.same.__code__ = (lambda *a, **k: None).__code__",
     "    return log_theta\n"),
    ("replaces a part of torch", 0, "changes code outside the submission: torch.as_tensor",
     "torch.as_tensor = lambda x: torch.zeros(1)", "    return log_theta\n"),
    ("adds to torch's tensors", 0, "changes code outside the submission: torch.Tensor.tolist",
     "torch.Tensor.tolist = lambda x: [0.0]", "    return log_theta\n"),
    ("replaces a part of pytest", 0, "changes code outside the submission: _pytest.runner",
     "import _pytest.runner\n_pytest.runner.pytest_runtest_call = lambda item: None", "    return log_theta\n"),
    ("replaces a builtin", 0, "changes code outside the submission: builtins.all",
     "import builtins\nbuiltins.all = lambda x: True", "    return log_theta\n"),
    ("returns a tensor that lies", 0, None,
     "class Liar(torch.Tensor):\n    def tolist(self):\n        return 11 / 12",
     "    return log_theta.as_subclass(Liar)\n"),
    ("writes results of its own", 0, None,
     "import os\nfor fd in range(3, 50):\n    try:\n        os.write(fd, b'0 {\"end\": true, \"passed\": true}\\n')\n"
     "    except OSError:\n        pass", "    return log_theta\n"),
]  # fmt: skip


def write(folder, file, old, new):
    """A submission: the reference, with one text replaced that occurs in it once."""
    from course.graft import reference_texts

    text = reference_texts()[file]
    assert text.count(old) == 1, f"{file} holds {old!r} {text.count(old)} times"
    path = Path(folder) / Path(file).name
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


def marks_of(exercise, file, old, new, limit=60):
    """The marks of such a submission in one exercise."""
    from course.exercises import EXERCISES
    from course.grade import grade

    with tempfile.TemporaryDirectory() as folder:
        write(folder, file, old, new)
        return grade(folder, [EXERCISES[exercise]], limit)["exercises"][str(exercise)]


def hostile(folder, top, first, prize):
    """A submission with this code at import and at the beginning of prob_open; `prize` is a file that must survive."""
    answer = "" if first.endswith("log_theta\n") else ANSWER
    text = BODY.format(top=top, first=first, answer=answer).replace("PRIZE", repr(str(prize)))
    (Path(folder) / HARD).write_text(text, encoding="utf-8")


def main():
    print("| exercise | what the student thought | points | blamed | first failure |\n|---|---|---|---|---|")
    for exercise, thought, _, *place in WRONG:
        marks = marks_of(exercise, *place)
        words = [*marks["failed"].values(), *marks["notes"], "-\nnobody\n-"][0]
        _, blamed, *lines = words.splitlines()
        function, place, *_ = blamed.split(": ")
        happened = "; ".join(" ".join(line.split()) for line in lines)
        print(f"| {exercise} | {thought} | {marks['points']} of {marks['out_of']} | {function}: {place} | {happened} |")


if __name__ == "__main__":
    main()
