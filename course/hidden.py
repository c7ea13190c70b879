"""Hidden tests, for `grade.py --hidden SEED`: the questions of the checks with random numbers, shapes and constants.

The right answer is what the reference answers to the same question, here in the grader. A solution that was made for
the numbers of the public tests fails these. The file stays with the teacher; one test per function and seed.
"""

import random

import torch

from course import questions
from course.checking import about, f64, holds, same
from course.plain import dumps, loads


def tests_for(number, seed):
    """{name: test} of one exercise."""
    tests = {}
    for function, equation, ask in CASES[number]:
        tests[f"hidden_{function}"] = _test(function, equation, ask, f"{seed} {function}")
    return tests


def _test(function, equation, ask, seed):
    @about(function, equation)
    def test():
        """It does with other numbers and shapes what it should."""
        for i in range(5):
            name, args = ask(random.Random(f"{seed} {i}"))
            question = getattr(questions, name)
            expected = loads(dumps(question.__wrapped__(*loads(dumps(list(args))))))
            _agree(question(*args), expected, f"{name}, hidden test {i}")

    return test


def _agree(got, expected, call):
    """Raises Different unless both are equal in all their parts. What a basis leaves open, signs, does not count."""
    if isinstance(expected, dict) and "A" in expected and "B" in expected:
        got, expected = (_without_signs(value) if isinstance(value, dict) else value for value in (got, expected))
    if isinstance(expected, dict):
        holds(isinstance(got, dict) and got.keys() == expected.keys(), call, type(got).__name__, "as many answers")
        for key, value in expected.items():
            if key != "draws":  # which are counted only where resample is called by this name
                _agree(got[key], value, f"{call}, {key}")
    elif isinstance(expected, list) and not all(isinstance(value, (int, float)) for value in expected):
        holds(isinstance(got, list) and len(got) == len(expected), call, type(got).__name__, f"{len(expected)} answers")
        for i, value in enumerate(expected):
            _agree(got[i], value, f"{call}, {i}")
    elif expected is None or isinstance(expected, str):
        holds(got == expected, call, got, expected)
    else:
        same(got, expected, call, within=1e-3)


def _without_signs(answer):
    """Columns of B and rows of A may change their signs together, so compare Gram matrices and the product."""
    plain = {key: value for key, value in answer.items() if key.split()[0] not in ("A", "B")}
    A, B = answer["A"], answer["B"]
    if A is None or B is None:
        return plain | {"A": A, "B": B}
    fits = A.ndim == B.ndim == 2 and len(A) == B.shape[1]
    return plain | {"B A": B @ A if fits else None, "B^T B": B.T @ B if fits else None}


def _values(rng, r, low=-3.0, high=3.0):
    return [round(rng.uniform(low, high), 3) for _ in range(r)]


def _constants(rng):
    """tau, gamma, zeta"""
    return rng.uniform(0.4, 2), -rng.uniform(0.05, 0.6), 1 + rng.uniform(0.05, 0.6)


def _layer(rng, **how):
    d, k, r = rng.randint(2, 9), rng.randint(2, 9), rng.randint(1, 5)
    layer = dict(d=d, k=k, r=r, alpha=rng.randint(1, 30), seed=rng.randint(1, 999), log_theta=_values(rng, r))
    return layer | {key: make(rng, r) for key, make in how.items()}


def _noise(rng, r):
    return _values(rng, r, 0.05, 0.95)


def _constant(rng, r):
    return [rng.choice([0.0, 0.5, 1.0]) for _ in range(r)]


def _layers(rng, **how):
    return [_layer(rng, **how) for _ in range(rng.randint(1, 4))]


def _inputs(rng, layer):
    return torch.randn(3, layer["k"], generator=torch.Generator().manual_seed(rng.randint(0, 999))).double()


def _gate(name):
    return lambda rng: (name, [f64(_values(rng, 4)), *_constants(rng)])


def _forward(rng):
    layer = _layer(rng, u=_noise) if rng.random() < 0.5 else _layer(rng, gates=_constant, pruned=lambda *_: True)
    return "forward", [layer, _inputs(rng, layer)]


def _schedule(rng):
    start = rng.randint(0, 8)
    return [20, start / 20, rng.randint(start, 19) / 20]


def _before_step(rng):
    schedule = _schedule(rng)
    T_start, T_end = round(schedule[1] * 20), round(schedule[2] * 20)
    if rng.random() < 0.5:
        return "before_step", [_layers(rng, gates=lambda *_: "held"), schedule, [T_start], rng.random(), 5]
    return "before_step", [_layers(rng), schedule, [T_end], rng.uniform(0.1, 0.9), 5]


def _after_backward(rng):
    layers = _layers(rng)
    task = torch.ones(layers[0]["r"], layers[0]["k"]).double() * rng.random()
    return "after_backward", [layers, _schedule(rng), rng.randint(0, 19), rng.random(), rng.random(), task]


def _after_step(rng):
    steps = [rng.randint(0, 19) for _ in range(3)]
    return "after_step", [_layers(rng), _schedule(rng), steps, rng.random(), rng.random(), 0.5, 0.3, 0.1]


def _sample(rng):
    return "sample_gate", [f64(_values(rng, 4)), f64(_noise(rng, 4)), *_constants(rng)]


def _with(name, **how):
    """Asks a question about layers, and about nothing else."""
    return lambda rng: (name, [_layers(rng, **how)])


CASES = {  # exercise: (function, equation, what to ask)
    1: [("prob_open", "8", _gate("prob_open"))],
    2: [("sample_gate", "7", _sample)],
    3: [("median_gate", "median", _gate("median_gate")), ("mean_gate", "E[g]", _gate("mean_gate"))],
    4: [
        ("SaLoRALinear.forward", "5", _forward),
        ("SaLoRALinear.delta", "merge", lambda rng: ("delta", [_layer(rng, u=_noise)])),
    ],
    5: [
        ("orthogonality", "9", _with("orthogonality")),
        ("canonicalize", "canonical", lambda rng: ("canonicalized", [_layer(rng)])),
    ],
    6: [
        ("total_parameters", "11", _with("total_parameters", gates=_constant, pruned=lambda *_: True)),
        ("expected_density", "11", _with("expected_density")),
        ("kept_density", "11", _with("kept_density", u=_noise)),
    ],
    7: [
        ("best_within_budget", "budget rule", lambda rng: ("best_within_budget", [_layers(rng), rng.uniform(0.05, 1)]))
    ],
    8: [
        ("Lagrangian.forward", "12", lambda rng: ("penalty_gradients", [rng.random(), rng.random(), rng.random()])),
        ("Lagrangian.ascend", "12", lambda rng: ("ascended", [rng.random(), _values(rng, 4), 0.3])),
        ("project", "projection", lambda rng: ("projected", [_layers(rng), rng.uniform(0.05, 0.95)])),
    ],
    9: [
        ("before_step", "alg 1", _before_step),
        ("after_backward", "alg 1", _after_backward),
        ("after_step", "alg 1", _after_step),
        ("finish", "alg 1", lambda rng: ("finish", [_layers(rng), [20, 0.1, 1.0], rng.uniform(0.1, 0.9)])),
    ],
}
