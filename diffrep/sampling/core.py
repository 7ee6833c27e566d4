"""The one machine behind the samplers: a table with one linear update per step, and its state.

Every multistep solver of the field writes the next state as

    x_next = carry * x + sum_j fixed_j m_j + scale * filter(sum_j direction_j m_j) + noise * z

with m_j the network's last predictions (newest first) as noise, clean sample or velocity, and numbers that depend on
the schedule and the grid alone. A solver is therefore a function that makes a table of `Update`s; `TableStepper` below
runs any table. It keeps what it needs in a dictionary of tensors, so that a canvas can be stepped strip by strip, and
stopped and resumed between any two steps with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from diffrep.sampling.schedules import SamplingError, TimeGrid

Form = Literal["noise", "data", "velocity"]
Clamp = Literal["static", "dynamic"]
State = dict[str, Tensor]


def to_forms(prediction: str, output: Tensor, x: Tensor, alpha: float, sigma: float) -> dict[Form, Tensor]:
    """A network's output as noise and clean sample.

    Args:
        prediction: what the network gives: "epsilon", "sample" (x0), "v_prediction" (`alpha eps - sigma x0`), "score"
            or "flow_prediction" (`eps - x0`, with alpha = 1 - sigma).
        x: the state that the network was shown, `alpha x0 + sigma eps`.

    Raises:
        SamplingError: no such prediction.
    """
    if prediction == "epsilon":
        noise, data = output, (x - sigma * output) / alpha
    elif prediction == "sample":
        noise, data = (x - alpha * output) / sigma, output
    elif prediction == "v_prediction":
        noise, data = alpha * output + sigma * x, alpha * x - sigma * output
    elif prediction == "score":
        noise, data = -sigma * output, (x + sigma**2 * output) / alpha
    elif prediction == "flow_prediction":
        noise, data = x + alpha * output, x - sigma * output
    else:
        raise SamplingError(
            f"a network predicts epsilon, sample, v_prediction, score or flow_prediction: {prediction!r}"
        )
    return {"noise": noise, "data": data, "velocity": noise - data}


def clamped(data: Tensor, how: Clamp, *, ratio: float = 0.995, largest: float = 1.0) -> Tensor:
    """A clean sample within -1..1; for pixels only.

    Args:
        how: "static" cuts it off; "dynamic" is dynamic thresholding (Saharia et al. 2022, sec. 2.3), which needs whole
            samples: a quantile of each that is above `largest` becomes 1.
    """
    if how == "static":
        return data.clamp(-largest, largest)
    bound = torch.quantile(data.abs().flatten(1).float(), ratio, dim=1).clamp(min=largest).to(data.dtype)
    bound = bound.view(-1, *[1] * (data.ndim - 1))
    return data.clamp(-bound, bound) / bound


@dataclass(frozen=True)
class Update:
    """How one step goes; see the formula of this module.

    Attributes:
        form: which form of the predictions it is linear in.
        carry: factor of the state it starts from.
        direction: weights of the predictions, newest first, in the sum that the table's filter sees.
        scale: factor of that sum.
        fixed: weights of the predictions, newest first, beside the filter.
        start: which state it starts from, counted back from the newest, -1.
        noise: standard deviation of the noise added.
        filtered: whether the table's filter acts on this step.
    """

    form: Form
    carry: float
    direction: tuple[float, ...]
    scale: float = 1.0
    fixed: tuple[float, ...] = ()
    start: int = -1
    noise: float = 0.0
    filtered: bool = True


class Filter:
    """What is done to the increment of a step with a memory of earlier steps. Without one: nothing.

    Attributes:
        whole: it needs whole samples, so that a canvas cannot be stepped by strips.
        watches: its memory follows the steps that it does not act on, too.
    """

    whole = False
    watches = False

    def first(self, predicted: Tensor) -> Tensor | None:
        """The memory before the first step, made of the first prediction; None: the first increment."""
        return None

    def __call__(self, increment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The increment to use, and the memory to keep."""
        raise NotImplementedError


@dataclass(frozen=True)
class SolverTable:
    """A solver on a grid: an `Update` for each step.

    Attributes:
        correctors: for each step, the update that is made again once the network has answered at the step's end
            (UniPC, USF); None: the step stands.
        smoothing: predictions enter the history as a running mean with this share of the newest (GHVB); 1: as they are.
        filter: acts on the increments.
        raw_start: the running mean and the filter begin with the network's raw output whatever it predicts, as the
            released momentum code does.
        clamp: clean samples are `clamped`, and the noise follows (pixels only).
        afs: the first prediction is taken without calling the network: "zero_x0" (the state is the noise) or
            "average_x0" (the clean sample is the mean of the data).
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

    @property
    def whole(self) -> bool:
        """Whether a step needs whole samples, so that a canvas cannot be stepped by strips."""
        return self.clamp == "dynamic" or (self.filter is not None and self.filter.whole)

    @property
    def noisy(self) -> bool:
        """Whether steps add noise."""
        return any(update.noise for update in self.updates)

    def corrector(self, step: int) -> Update | None:
        """The corrector of a step."""
        return self.correctors[step] if step < len(self.correctors) else None

    @property
    def depth(self) -> dict[Form, int]:
        """How many predictions of each form are looked back on."""
        depth: dict[Form, int] = {}
        for update in (*self.updates, *filter(None, self.correctors)):
            length = max(len(update.direction), len(update.fixed))
            depth[update.form] = max(depth.get(update.form, 0), length)
        return depth

    @property
    def states(self) -> int:
        """How many states are looked back on, the newest among them."""
        return max(-update.start for update in (*self.updates, *filter(None, self.correctors)))


@dataclass
class TableStepper:
    """Runs a `SolverTable`. Its memory is passed in and out: `step` changes nothing.

    Attributes:
        prediction: what the network gives, see `to_forms`.
    """

    table: SolverTable
    prediction: str = "epsilon"
    average: Tensor | None = field(default=None, repr=False)  # mean image, for afs = "average_x0"

    def predict(self, step: int, output: Tensor | None, x: Tensor) -> dict[Form, Tensor]:
        """The forms of an output at a step's start; None stands for the first output of a table with `afs`."""
        alpha, sigma = float(self.table.grid.alpha[step]), float(self.table.grid.sigma[step])
        if output is None:
            if self.table.afs == "average_x0":
                if self.average is None:
                    raise SamplingError("afs average_x0 needs the mean of the data")
                forms = to_forms("sample", self.average.to(x).expand_as(x), x, alpha, sigma)
            else:
                forms = to_forms("epsilon", x, x, alpha, sigma)
        else:
            forms = to_forms(self.prediction, output, x, alpha, sigma)
        if self.table.clamp:
            forms = to_forms("sample", clamped(forms["data"], self.table.clamp), x, alpha, sigma)
        return forms

    def step(
        self, step: int, output: Tensor | None, x: Tensor, memory: Mapping[str, Tensor], z: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Take one step.

        Args:
            step: its number, from 0.
            output: the network's answer for `x` at the step's label.
            x: (B, ...) the state as the last step returned it.
            memory: what the last step returned with it; empty before the first.
            z: standard normal noise like x, for steps that add some.

        Returns:
            The next state, and the memory for the step after.

        Raises:
            SamplingError: the step adds noise and there is none.
        """
        table, forms = self.table, self.predict(step, output, x)
        state: State = dict(memory)
        if table.smoothing != 1:
            (form,) = table.depth
            first = output if table.raw_start and output is not None else forms[form]
            mean = state.get("mean", first)
            state["mean"] = (1 - table.smoothing) * mean + table.smoothing * forms[form]
            forms = {**forms, form: state["mean"]}
        for form, depth in table.depth.items():
            for age in range(min(depth, step + 1) - 1, 0, -1):
                state[f"{form}-{age}"] = state[f"{form}-{age - 1}"]
            state[f"{form}-0"] = forms[form]
        for age in range(min(table.states, step + 1) - 1, 0, -1):
            state[f"x-{age}"] = state[f"x-{age - 1}"]
        state["x-0"] = x
        if table.filter is not None and "increment" not in state:
            update = table.updates[step]
            begin = output if table.raw_start and output is not None else table.filter.first(forms[update.form])
            if begin is not None:
                state["increment"] = begin
        if step and (corrector := table.corrector(step - 1)) is not None:
            state["x-0"] = self._apply(corrector, state, None)
        update = table.updates[step]
        if update.noise and z is None:
            raise SamplingError(f"{table.name} adds noise at step {step}, and no noise was passed")
        moved = self._apply(update, state, z)
        return moved, self._needed(state, step + 1)

    def finish(self, output: Tensor, x: Tensor, memory: Mapping[str, Tensor]) -> Tensor:
        """The last state corrected with the network's answer at the last time, where the last step asks for it."""
        corrector, steps = self.table.corrector(self.table.grid.steps - 1), self.table.grid.steps
        if corrector is None:
            return x
        state, depth = dict(memory), self.table.depth[corrector.form]
        for age in range(min(depth, steps + 1) - 1, 0, -1):
            state[f"{corrector.form}-{age}"] = state[f"{corrector.form}-{age - 1}"]
        for age in range(self.table.states - 1, 0, -1):
            state[f"x-{age}"] = state[f"x-{age - 1}"]
        state[f"{corrector.form}-0"], state["x-0"] = self.predict(steps, output, x)[corrector.form], x
        return self._apply(corrector, state, None)

    def _apply(self, update: Update, state: State, z: Tensor | None) -> Tensor:
        """One update; puts the filter's memory into the state."""

        def combined(weights: Sequence[float]) -> Tensor | None:
            terms = [w * state[f"{update.form}-{age}"] for age, w in enumerate(weights) if w]
            return sum(terms[1:], terms[0]) if terms else None

        moved = update.carry * state[f"x-{-update.start - 1}"]
        if (fixed := combined(update.fixed)) is not None:
            moved = moved + fixed
        if (increment := combined(update.direction)) is not None:
            if self.table.filter is not None and (update.filtered or self.table.filter.watches):
                used, state["increment"] = self.table.filter(increment, state.get("increment", increment))
                increment = used if update.filtered else increment
            moved = moved + update.scale * increment
        if update.noise and z is not None:
            moved = moved + update.noise * z
        return moved

    def _needed(self, state: State, step: int) -> State:
        """What later steps read of a state."""
        if step >= self.table.grid.steps and self.table.corrector(step - 1) is None:
            return {}
        keep = {"mean", "increment"}
        keep |= {f"{form}-{age}" for form, depth in self.table.depth.items() for age in range(depth - 1)}
        keep |= {f"x-{age}" for age in range(self.table.states - 1)}
        return {name: value for name, value in state.items() if name in keep}


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
        network: from (state, label of the time) to its prediction.
        x: (B, ...) the first state, `sigma(first)` times standard normal noise.
        prediction: what the network gives, see `to_forms`.
        noise: standard normal noise of each step, for tables that add some.
        average: mean of the data, for `afs` = "average_x0".
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
        x = stepper.finish(network(x, float(table.grid.times[-1])), x, memory)
    return x
