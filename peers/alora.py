"""ALoRA: ranks move from where they are not missed to where they are needed (Liu et al., NAACL 2024, arXiv 2403.16187).

Train; score every rank by what its absence costs and what it does alone, on rows that training does not see (Eq. 6);
close the worst ranks, and open as many in the matrices that lost none; train on, and repeat (sections 3.3, 3.4).

A matrix has r0 slots, of which the share `budget` is open at the start and, over all matrices, always: a move closes
as many as it opens. A closed slot has gate 0; one that opens starts afresh, A random and B = 0, so that opening it
changes no output. The budget is a number of ranks, as in the paper, whatever a rank costs.
The paper's K_1, K_2, N_A and n_A follow from the numbers below. Left out: trained architecture weights, from which the
paper starts and which it then does without.
"""

import torch

from budget import affordable, check_budget
from peers.allocator import Allocator, normal
from rank_allocator import moments_of

START, END = 0.2, 0.5  # of all steps, SaLoRA's published window; the paper's K_1, K_2 count epochs
ROUNDS = 8  # N_A
CLOSED = 1 / 32  # n_A over the number of open ranks. What opens has to learn anew: at 1/8, short runs learn nothing


def hold_out(rows, batch):
    """(rows to train on, rows to score ranks on): the last ones, a batch of them or an eighth, whichever is less.

    Raises ValueError for fewer than two rows.
    """
    if len(rows) < 2:
        raise ValueError(f"ALoRA needs one row to train on and another to score ranks on, got {len(rows)}")
    n = max(1, min(batch, len(rows) // 8))
    return rows[:-n], rows[-n:]


class ALoRA(Allocator):
    """The hooks of RankAllocator, for ALoRA.

    score: () -> S(M), the negative loss of the model as it is on validation rows; evaluated twice for every open rank.
    budget: the share of the r0 slots of all matrices that are open.
    """

    def __init__(self, model, optimizer, total_steps, score, budget=0.5, **rest):
        check_budget(budget)
        super().__init__(model, optimizer, total_steps, **rest)
        self.score, self.budget = score, budget
        length = (END - START) / ROUNDS
        self.moves = {round((START + i * length) * total_steps) for i in range(ROUNDS)}

    @property
    def phase(self):
        return "before" if self.step <= min(self.moves) else "window" if self.step <= max(self.moves) else "after"

    def before_step(self, step):
        """At the start every matrix gets the same number of open ranks, or one more; later, a move where one is due."""
        super().before_step(step)
        if step == 0:
            self.open_evenly()
        if step in self.moves:
            self.move()

    def open_evenly(self):
        layers = list(self.layers.values())
        total = affordable(self.budget, sum(layer.r for layer in layers))
        for i, layer in enumerate(layers):
            open_now = total // len(layers)
            if i < total % len(layers):
                open_now += 1
            layer.gate.fix((torch.arange(layer.r, device=layer.A.device) < open_now).float())

    @torch.no_grad()
    def importance(self):
        """{(i, j): the importance score of rank j of matrix i}, for every open rank: Eq. (6)."""
        gates = [layer.gate.fixed for layer in self.layers.values()]
        whole = [gate.clone() for gate in gates]
        ranks = [(i, j) for i, gate in enumerate(gates) for j in gate.nonzero().flatten().tolist()]
        everything, scores = self.score(), {}  # S(M)
        for i, j in ranks:
            gates[i][j] = 0
            without = self.score()  # S(M without r)
            for gate in gates:
                gate.zero_()
            gates[i][j] = 1
            alone = self.score()  # S(M with only r)
            for gate, before in zip(gates, whole):
                gate.copy_(before)
            scores[i, j] = everything - without + alone
        return scores

    def choose(self, scores):
        """(ranks to close, matrices to open one in, a matrix as often as it gets one): equally many of both."""
        gates = [layer.gate.fixed for layer in self.layers.values()]
        worst = sorted(scores, key=scores.get)
        most = min(len(scores), max(1, round(CLOSED * len(scores))))
        for n in range(most, 0, -1):  # the largest number for which there is room
            close = worst[:n]
            losers = {i for i, _ in close}
            room = {i: int((gate == 0).sum()) for i, gate in enumerate(gates) if i not in losers}
            if sum(room.values()) >= n:
                return close, share_out(n, room, matrix_means(scores))
        return [], []

    @torch.no_grad()
    def move(self):
        close, receivers = self.choose(self.importance())
        layers = list(self.layers.values())
        gates = [layer.gate.fixed.clone() for layer in layers]
        for i in receivers:
            j = int((gates[i] == 0).nonzero()[0])
            self.start_afresh(layers[i], j)
            gates[i][j] = 1
        for i, j in close:
            gates[i][j] = 0
        for layer, gate in zip(layers, gates):
            layer.gate.fix(gate)

    def start_afresh(self, layer, j):
        """Rank j of a layer becomes new, in the optimizer as well."""
        k = layer.A.shape[1]
        layer.A[j] = normal((k,), self.noise, layer.A) / k**0.5
        layer.B[:, j] = 0
        for p, row in ((layer.A, j), (layer.B, (slice(None), j))):
            for moment in moments_of(self.optimizer, p).values():
                moment[row] = 0


def matrix_means(scores):
    """{matrix: the mean score of its open ranks}."""
    found = {}
    for (i, _), score in scores.items():
        found.setdefault(i, []).append(score)
    return {i: sum(some) / len(some) for i, some in found.items()}


def share_out(n, room, means):
    """n ranks for the matrices with room, {matrix: how many fit}: one for each in turn, the most important first."""
    order = sorted(room, key=lambda i: -means.get(i, float("-inf")))
    turns = [i for turn in range(max(room.values())) for i in order if room[i] > turn]
    return turns[:n]
