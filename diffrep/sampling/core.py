"""The one machine behind the samplers: a table with one linear update per step, and its state.

Every multistep solver of the field writes the next state as

    x_next = carry * x + sum_j fixed_j m_j + scale * filter(sum_j direction_j m_j) + noise * z

with m_j the network's last predictions, newest first, and numbers that depend on the schedule and the grid alone. A
solver is therefore a function that makes a table of `Update`s; `TableStepper` runs any table. Its memory is a
dictionary of tensors, so that a canvas can be stepped by strips, and stopped and resumed between steps to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from diffrep.sampling.schedules import SamplingError, TimeGrid

Form = Literal["noise", "data", "velocity"]
Clamp = Literal["static", "dynamic"]
State = dict[str, Tensor]

PREDICTIONS: dict[str, Callable[[Tensor, Tensor, float, float], tuple[Tensor, Tensor]]] = {
    # what a network gives -> (output, x, alpha, sigma) as noise and clean sample
    "epsilon": lambda o, x, a, s: (o, (x - s * o) / a),
    "sample": lambda o, x, a, s: ((x - a * o) / s, o),
    "v_prediction": lambda o, x, a, s: (a * o + s * x, a * x - s * o),  # alpha eps - sigma x0
    "score": lambda o, x, a, s: (-s * o, (x + s**2 * o) / a),
    "flow_prediction": lambda o, x, a, s: (x + a * o, x - s * o),  # eps - x0, with alpha = 1 - sigma
}


def to_forms(prediction: str, output: Tensor, x: Tensor, alpha: float, sigma: float) -> dict[Form, Tensor]:
    """A network's output as noise, clean sample and velocity `eps - x0`.

    Args:
        prediction: what the network gives, a name of `PREDICTIONS`.
        x: the state that the network was shown, `alpha x0 + sigma eps`.

    Raises:
        SamplingError: no such prediction.
    """
    if prediction not in PREDICTIONS:
        raise SamplingError(f"a network predicts one of {', '.join(PREDICTIONS)}: got {prediction!r}")
    noise, data = PREDICTIONS[prediction](output, x, alpha, sigma)
    return {"noise": noise, "data": data, "velocity": noise - data}


def clamped(data: Tensor, how: Clamp, *, most: float | None = None) -> Tensor:
    """A clean sample within -1..1; for pixels only.

    "static" cuts it off; "dynamic" is dynamic thresholding (Saharia et al. 2022, sec. 2.3), which needs whole samples:
    the quantile .995 of each that is above 1, or `most` if it is above that, becomes 1.
    """
    if how == "static":
        return data.clamp(-1, 1)
    bounds = torch.quantile(data.abs().flatten(1).float(), 0.995, dim=1).clamp(1, most).to(data.dtype)
    bound = per_sample(bounds, data)
    return data.clamp(-bound, bound) / bound


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """(B,) values, or a scalar, to multiply a batch like x with."""
    return values.view(-1, *[1] * (x.ndim - 1)) if values.ndim else values


def over_sample(x: Tensor) -> Tensor:
    """Sums (B, 1, ...) of samples."""
    return per_sample(x.flatten(1).sum(1), x)


@dataclass(frozen=True)
class Update:
    """How one step goes; see the formula of this module.

    Attributes:
        form: which form of the predictions it is linear in.
        carry: factor of the state it starts from; `start` says which, counted back from the newest, -1.
        direction: weights of the predictions, newest first, in the sum that the filter sees; `scale` is its factor.
        fixed: weights of the predictions, newest first, beside the filter.
        noise: standard deviation of the noise added.
        filtered: whether the table's filter acts on this step.
        rule: for weights that depend on the predictions themselves: what to add to the carried state, of the last
            predictions, newest first; `direction` says of how many.
    """

    form: Form
    carry: float
    direction: tuple[float, ...]
    scale: float = 1.0
    fixed: tuple[float, ...] = ()
    start: int = -1
    noise: float = 0.0
    filtered: bool = True
    rule: Callable[[list[Tensor]], Tensor] | None = None

    @property
    def depth(self) -> int:
        """How many predictions it looks back on."""
        return max(len(self.direction), len(self.fixed))


@dataclass(frozen=True)
class Filter:
    """What is done to the increment of a step with a memory of earlier steps."""

    act: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (increment, memory) -> what to use, the new memory
    from_prediction: bool = False  # the memory begins as the first prediction; else as the first increment
    whole: bool = False  # it needs whole samples, so that a canvas cannot be stepped by strips
    watches: bool = False  # its memory follows the steps that it does not act on, too


@dataclass(frozen=True)
class SolverTable:
    """A solver on a grid: an `Update` for each step.

    Attributes:
        correctors: for each step, what it is made again by once the network has answered at its end (UniPC, USF).
        smoothing: predictions enter the history as a running mean with this share of the newest (GHVB).
        filter: acts on the increments.
        raw_start: running mean and filter begin with the network's raw output, as the released momentum code does.
        clamp: clean samples are `clamped`, and the noise follows (pixels only).
        afs: the first prediction without a call: "zero_x0" (the state is the noise) or "average_x0" (of the data).
    """

    name: str
    grid: TimeGrid
    updates: tuple[Update, ...]
    correctors: tuple[Update | None, ...] = ()
    smoothing: float = 1.0
    filter: Filter | None = None
    raw_start: bool = False
    clamp: Clamp | None = None
    afs: str | None = None

    def __post_init__(self) -> None:
        if len(self.updates) != self.grid.steps:
            raise SamplingError(f"{self.name}: {len(self.updates)} updates on a grid of {self.grid.steps} steps")

    @cached_property
    def _all(self) -> list[Update]:
        return [update for update in (*self.updates, *self.correctors) if update is not None]

    @property
    def whole(self) -> bool:
        """Whether a step needs whole samples, so that a canvas cannot be stepped by strips."""
        rules = any(update.rule for update in self._all)
        return self.clamp == "dynamic" or rules or (self.filter is not None and self.filter.whole)

    @property
    def noisy(self) -> bool:
        """Whether steps add noise."""
        return any(update.noise for update in self.updates)

    def corrector(self, step: int) -> Update | None:
        """The corrector of a step."""
        return self.correctors[step] if step < len(self.correctors) else None

    @cached_property
    def depth(self) -> dict[str, int]:
        """How many predictions of each form, and states ("x"), are looked back on, the newest among them."""
        depth = {"x": max(-update.start for update in self._all)}
        for update in self._all:
            depth[update.form] = max(depth.get(update.form, 0), update.depth)
        return depth

    @cached_property
    def needed(self) -> set[str]:
        """Names of what later steps read of a stepper's memory."""
        return {"mean", "increment"} | {f"{name}-{i}" for name, n in self.depth.items() for i in range(n - 1)}


@dataclass
class TableStepper:
    """Runs a `SolverTable`. Its memory is passed in and out: `step` changes nothing."""

    table: SolverTable
    prediction: str = "epsilon"  # what the network gives, see `to_forms`
    average: Tensor | None = field(default=None, repr=False)  # mean image of the data, for `afs` = "average_x0"

    def predict(self, step: int, output: Tensor | None, x: Tensor) -> dict[Form, Tensor]:
        """The forms of an output at a step's start; None stands for the first output of a table with `afs`."""
        alpha, sigma = float(self.table.grid.alpha[step]), float(self.table.grid.sigma[step])
        if output is not None:
            forms = to_forms(self.prediction, output, x, alpha, sigma)
        elif self.table.afs != "average_x0":
            forms = to_forms("epsilon", x, x, alpha, sigma)
        elif self.average is None:
            raise SamplingError("afs average_x0 needs the mean of the data")
        else:
            forms = to_forms("sample", self.average.to(x).expand_as(x), x, alpha, sigma)
        if self.table.clamp:
            forms = to_forms("sample", clamped(forms["data"], self.table.clamp), x, alpha, sigma)
        return forms

    def step(
        self, step: int, output: Tensor | None, x: Tensor, memory: Mapping[str, Tensor], z: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Take one step.

        Args:
            step: its number, from 0; the number of steps itself stands for the corrector of the last one.
            output: the network's answer for `x` at the step's label.
            x, memory: (B, ...) the state and what the last step returned with it; empty before the first.
            z: standard normal noise like x, for steps that add some.

        Returns:
            The next state, and the memory for the step after.

        Raises:
            SamplingError: the step adds noise and there is none.
        """
        table, state, steps = self.table, State(memory), self.table.grid.steps
        newest = {"x": x} | {str(form): value for form, value in self.predict(step, output, x).items()}
        update = table.updates[min(step, steps - 1)]
        raw = output if table.raw_start and output is not None else newest[update.form]
        if table.smoothing != 1:
            mean = state.get("mean", raw)
            state["mean"] = (1 - table.smoothing) * mean + table.smoothing * newest[update.form]
            newest[update.form] = state["mean"]
        for name, depth in table.depth.items():
            for age in range(min(depth, step + 1) - 1, 0, -1):
                state[f"{name}-{age}"] = state[f"{name}-{age - 1}"]
            state[f"{name}-0"] = newest[name]
        if table.filter is not None and table.filter.from_prediction:
            state.setdefault("increment", raw)
        if step and (corrector := table.corrector(step - 1)) is not None:
            state["x-0"] = self._apply(corrector, state, None)
        if step == steps:
            return state["x-0"], {}
        if update.noise and z is None:
            raise SamplingError(f"{table.name} adds noise at step {step}, and no noise was passed")
        moved, last = self._apply(update, state, z), step + 1 == steps and table.corrector(step) is None
        return moved, {} if last else {name: value for name, value in state.items() if name in table.needed}

    def _apply(self, update: Update, state: State, z: Tensor | None) -> Tensor:
        """One update; puts the filter's memory into the state."""
        moved = update.carry * state[f"x-{-update.start - 1}"]
        if update.rule is not None:
            return moved + update.rule([state[f"{update.form}-{age}"] for age in range(update.depth)])

        def combined(weights: Sequence[float]) -> Tensor | None:
            terms = [w * state[f"{update.form}-{age}"] for age, w in enumerate(weights) if w]
            return sum(terms[1:], terms[0]) if terms else None

        if (fixed := combined(update.fixed)) is not None:
            moved = moved + fixed
        if (increment := combined(update.direction)) is not None:
            guard = self.table.filter
            if guard is not None and (update.filtered or guard.watches):
                used, state["increment"] = guard.act(increment, state.get("increment", increment))
                increment = used if update.filtered else increment
            moved = moved + update.scale * increment
        return moved + update.noise * z if update.noise and z is not None else moved


def run(
    table: SolverTable,
    network: Callable[[Tensor, float], Tensor],
    x: Tensor,
    *,
    prediction: str = "epsilon",
    noise: Sequence[Tensor] | Callable[[int], Tensor] | None = None,
    average: Tensor | None = None,
    after_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Sample with a table from the state at its first time to that at its last.

    Args:
        network: from (state, label of the time) to its prediction; of what kind, see `TableStepper`.
        x: (B, ...) the first state, `sigma(first)` times standard normal noise.
        noise: standard normal noise of each step, for tables that add some.
        after_step: sees each finished step's number and state.

    Returns:
        (B, ...) the state at the last time.

    Raises:
        SamplingError: a step's result is not finite: the solver diverges.
    """
    stepper, memory = TableStepper(table, prediction, average), State()
    for step, label in enumerate(table.grid.labels.tolist()):
        output = None if step == 0 and table.afs else network(x, label)
        z = None
        if table.updates[step].noise and noise is not None:
            z = noise(step) if callable(noise) else noise[step]
        x, memory = stepper.step(step, output, x, memory, z)
        if not bool(torch.isfinite(x).all()):
            raise SamplingError(
                f"{table.name} diverges: step {step + 1} of {table.grid.steps} gives values that are not finite"
            )
        if after_step is not None:
            after_step(step, x)
    if table.corrector(table.grid.steps - 1) is not None:
        x, _ = stepper.step(table.grid.steps, network(x, float(table.grid.times[-1])), x, memory)
    return x
