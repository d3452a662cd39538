"""The fit loop: one for every objective. Read ``Fit.run`` from top to bottom.

Every sample's place is a function of (seed, epoch), every random number of (seed, step, rank), every rate of the step: so a run
that was cut off and resumed is the run that was not, and world sizes differ by rounding only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from horovod_jobs.config import FitConfig
from horovod_jobs.data.base import Batch, batches
from horovod_jobs.data.sharding import epoch_permutation, micro_batches, num_batches
from horovod_jobs.evaluation import evaluate
from horovod_jobs.footprint import Footprint
from horovod_jobs.formats import throughput
from horovod_jobs.interrupt import stopped
from horovod_jobs.stages.base import StageContext
from horovod_jobs.strategy.base import Setting, StepTime, Strategy
from horovod_jobs.strategy.elastic import commits_of
from horovod_jobs.training.batchnorm import SyncBatchNorm, Waiting
from horovod_jobs.training.checkpoint import Checkpoints
from horovod_jobs.training.ema import Ema
from horovod_jobs.training.nonfinite import refuse_non_finite
from horovod_jobs.training.precision import Precision
from horovod_jobs.training.schedules import Schedule
from horovod_jobs.training.state import FitState, Timing, seed_step

_VALIDATION_BATCH = 256


class Fit:
    """Trains an objective's parameters on the training split of ``ctx.data``."""

    def __init__(
        self,
        ctx: StageContext,
        objective: Any,
        *,
        config: FitConfig,
        global_batch: int,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        strategy: Strategy,
        augment: bool,
        identity: str,
    ) -> None:
        self.ctx, self.world, self.config = ctx, ctx.world, config
        self.objective: Any = objective
        # An elastic strategy follows the number of ranks.
        adjust = getattr(strategy, "adjust", None)
        now = adjust(config, global_batch=global_batch, size=ctx.world.size) if adjust is not None else None
        self.global_batch: int = global_batch if now is None else now.global_batch
        self.accumulate: int = config.accumulate if now is None else now.accumulate
        self.optimizer, self.schedule = optimizer, schedule
        self.augment = ctx.data.augment if augment else None
        self.device = next(objective.parameters()).device
        self.precision = Precision(config.precision, device=self.device)
        self.checkpoints = Checkpoints(ctx.work, keep=config.checkpoint_keep, world=ctx.world, log=ctx.log)
        self.state = FitState()
        self.timing, self.whole = Timing(), Timing()
        self.identity = identity
        self.spent_before: Footprint | None = None
        self.resumed_from: int | None = None
        self.steps_per_epoch = self._batches(len(ctx.data.train))
        self.scheduled_steps = self.total_steps = self._limited(self.steps_per_epoch * config.epochs)
        self.rates = [group["lr"] * self._rate_scale() for group in optimizer.param_groups]
        self.ema = Ema(objective, decay=config.ema_decay) if config.ema_decay is not None else None
        self.strategy = strategy
        self.commits = commits_of(strategy, identity=identity)
        self.bad: Tensor | None = None  # this rank's samples of the step whose loss was not finite
        self.stop_code, self.checkpoint_due = 0, False
        self.lost = 0  # ranks of which has been told that they died

    def _rate_scale(self) -> float:
        """Linear scaling of the rate with the batch (Goyal et al. 2017, arXiv:1706.02677, section 2.1)."""
        reference = self.config.lr_reference_batch
        return 1.0 if reference is None else self.global_batch / reference

    def _batches(self, samples: int) -> int:
        return num_batches(samples, global_batch=self.global_batch, drop_last=self.config.drop_last)

    def _limited(self, steps: int) -> int:
        return steps if self.config.max_steps is None else min(steps, self.config.max_steps)

    # --- 1. the run -------------------------------------------------------------------------------------------------
    def run(self) -> FitState:
        """Collective. Train to the end, or to an agreed stop.

        Raises:
            Interrupted: a stop was agreed; a checkpoint is written.
            NonFiniteError: a rank's loss is NaN or infinite; nothing is published.
            StorageError: a checkpoint cannot be written; the ones before are whole.
        """
        strategy_state, rank_states = self._resume()
        # Batches may have been of another size before: from here on they are of this one.
        whole_epochs = self.config.epochs - self.state.epoch - 1
        self.total_steps = self._limited(self.state.step + self._left() + whole_epochs * self.steps_per_epoch)
        self._broadcast()
        self.updater = self.strategy.bind(
            self.optimizer,
            self.objective.named_parameters(),
            Setting(
                self.world,
                accumulate=self.accumulate,
                total_steps=self.total_steps,
                steps_per_epoch=self.steps_per_epoch,
                clip_norm=self.config.clip_norm,
                loss_scaled=self.config.precision == "fp16",
                synced_batchnorm=any(isinstance(module, SyncBatchNorm) for module in self.objective.modules()),
                averages_weights=self.ema is not None,
                first_step=self.state.step,
                model=self.objective,
            ),
        )
        self.updater.restore(strategy_state)
        self._restore_rank(rank_states)
        self.last_checkpoint = time.monotonic()
        try:
            with self.ctx.console.progress(self.ctx.name, self.total_steps) as self.progress:
                while not self.state.finished:
                    self._epoch()
        finally:
            self.updater.close()
        if self.config.publish == "best" and self.state.best_step is not None:
            self.objective.load_state_dict(self.checkpoints.load_best(self.state.best_step))
        elif self.ema is not None:
            self.objective.load_state_dict(self.ema.average)
        return self.state

    # --- 2. an epoch ------------------------------------------------------------------------------------------------
    def _epoch(self) -> None:
        state = self.state
        self.objective.train()
        order = epoch_permutation(len(self.ctx.data.train), seed=self.ctx.seed, epoch=state.epoch)
        while (left := self._left()) and state.step < self.total_steps:
            part = list(order[state.seen :].split(self.global_batch))[: min(left, self._segment())]
            loader, workers = self._load(part), self._workers()
            for indices in part:
                self._step(indices, loader)
                if self._workers() != workers:
                    break  # A rank has died, and from this step on the others divide its samples.
            if self.updater.reshare_every is not None:
                self.updater.reshare()
        if not self._left() or state.step >= self.total_steps:
            self._end_epoch()

    def _left(self) -> int:
        """Batches until the end of the epoch."""
        return self._batches(max(0, len(self.ctx.data.train) - self.state.seen))

    def _workers(self) -> tuple[tuple[int, ...], tuple[float, ...] | None]:
        """The ranks, and how they divide a batch; what is new about them is told."""
        for lost in self.updater.lost[self.lost :]:
            self.lost += 1
            self.ctx.events.emit("rank_lost", stage=self.ctx.name, step=self.state.step, **lost)
        return self.world.ranks, self.updater.shares

    def _segment(self) -> int:
        """Steps until the end, or until the shares of the ranks may change."""
        left, every = self.total_steps - self.state.step, self.updater.reshare_every
        return left if every is None else min(left, every - self.state.batch % every)

    def _load(self, plan: list[Tensor]) -> Iterator[Batch]:
        mine = (part for indices in plan for part in self._micro_batches(indices))
        return batches(self.ctx.data.train, mine, workers=self.config.workers)

    def _micro_batches(self, indices: Tensor) -> list[Tensor]:
        """This rank's part of a global batch."""
        world, accumulate = self.world, self.accumulate
        return micro_batches(
            indices, rank=world.rank, size=world.size, accumulate=accumulate, shares=self.updater.shares
        )

    # --- 3. an update -----------------------------------------------------------------------------------------------
    def _step(self, indices: Tensor, loader: Iterator[Batch]) -> None:
        state, clock = self.state, time.perf_counter
        start, waited_s = clock(), Waiting.seconds
        seed_step(self.ctx.seed, state.step, self.world.rank)
        self._set_rate()
        self.updater.zero_grad()
        data_s, samples = 0.0, 0
        sums: dict[str, Tensor] = {}
        for _ in range(self.accumulate):
            asked = clock()
            batch = self._next(loader)
            data_s += clock() - asked
            samples += len(batch)
            with self.precision.autocast():
                output = self.objective(batch)
            # Divided by the global batch here and summed by the exchange: exact for shares of any size.
            self.precision.scale(output.loss / len(indices)).backward()
            for name, value in {"loss": output.loss.detach(), **output.sums}.items():
                sums[name] = sums[name] + value if name in sums else value
        names = [*sums, "count"]
        local = torch.stack([*(value.double() for value in sums.values()), torch.tensor(float(samples)).double()]).cpu()
        if not bool(torch.isfinite(local).all()) and self.bad is None:
            self.bad = torch.cat(self._micro_batches(indices))
        computed = clock()
        agreed = self._agree(local)
        self.updater.synchronize()
        control = agreed.wait().tolist()
        exchanged = clock()
        if control[0] > 0:
            refuse_non_finite(self.ctx, self.state, mine=self.bad)
        self.precision.unscale(self.updater)
        self.precision.step(self.updater)
        if self.ema is not None:
            self.ema.update()
        end = clock()
        compute_s = computed - start - data_s
        for timing in (self.timing, self.whole):
            timing.data += data_s
            timing.compute += compute_s + end - exchanged
            timing.exchange += exchanged - computed
            timing.total += end - start
            timing.steps += 1
            timing.samples += len(indices)
        own_s = compute_s - (Waiting.seconds - waited_s)
        self.updater.finish_step(StepTime(total_s=end - start, compute_s=own_s, samples=samples))
        self._account(dict(zip(names, control[4:], strict=True)), samples=len(indices))
        self._after_step(control[1:4])

    def _next(self, loader: Iterator[Batch]) -> Batch:
        batch = next(loader)
        if self.augment is not None and len(batch):
            inputs = self.augment(batch.inputs, seed=self.ctx.seed, epoch=self.state.epoch, indices=batch.indices)
            batch = Batch(inputs, batch.targets, batch.indices)
        batch = batch.to(self.device)
        if self.config.channels_last and batch.inputs.dim() == 4:
            batch = Batch(batch.inputs.contiguous(memory_format=torch.channels_last), batch.targets, batch.indices)
        return batch

    def _agree(self, sums: Tensor) -> Any:
        """Start the one small exchange of a step, which travels with the gradients: [non-finite, stop, Ctrl-C, checkpoint, sums...]."""
        due = 0.0
        if self.world.is_main and self.config.checkpoint_every_s is not None:
            due = float(time.monotonic() - self.last_checkpoint >= self.config.checkpoint_every_s)
        stop, finite = self.ctx.stop.code, self.bad is None
        head = torch.tensor([float(not finite), float(stop == 1), float(stop == 2), due], dtype=torch.float64)
        return self.updater.agree(torch.cat([head, sums if finite else torch.zeros_like(sums)]))

    def _account(self, sums: dict[str, float], *, samples: int) -> None:
        state = self.state
        state.step += 1
        state.batch += 1
        state.seen += samples
        for name, value in sums.items():
            state.sums[name] = state.sums.get(name, 0.0) + value
        loss = sums["loss"] / max(1.0, sums["count"])
        rate = self.whole.samples / max(1e-9, self.whole.total)
        self.progress.update(state.step, f"loss {loss:.4f}, {rate:.0f} samples/s")
        if state.step % self.config.log_every_steps == 0:
            self._log_scalars({"train_loss": loss, **self.timing.figures()})
            self.timing = Timing()

    def _after_step(self, asked: list[float]) -> None:
        """Write a checkpoint that is due and stop where that was asked for, as soon as the ranks have settled."""
        every = self.config.checkpoint_every_steps
        self.stop_code = max(self.stop_code, 2 if asked[1] > 0 else 1 if asked[0] > 0 else 0)
        self.checkpoint_due |= asked[2] > 0 or (every is not None and self.state.step % every == 0)
        if self.commits is not None and self.commits.due(self.state.step):
            spent = self.spent_before or Footprint.zero()  # Metered anew for checkpoints only, which are rare.
            self.commits.keep(self._snapshot(spent), step=self.state.step)
        if not self.updater.settled or not (self.stop_code or self.checkpoint_due):
            return
        self.world.steady(self.save)
        if self.stop_code:
            where = f"in stage {self.ctx.name} after step {self.state.step} of {self.total_steps}"
            raise stopped(self.stop_code, where=where)

    # --- 4. the end of an epoch -------------------------------------------------------------------------------------
    def _end_epoch(self) -> None:
        state, config = self.state, self.config
        self.world.steady(self._settle)
        sums = self.world.steady(self._sums)
        entry: dict[str, float | int] = {
            "epoch": state.epoch + 1,
            "step": state.step,
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        if sums.get("count"):
            entry["train_loss"] = sums["loss"] / sums["count"]
            entry["train_accuracy"] = sums["correct"] / sums["count"] if "correct" in sums else float("nan")
        entry["samples_per_s"] = self.whole.figures()["samples_per_s"]
        last = state.epoch + 1 >= config.epochs or state.step >= self.total_steps
        every = config.validate_every_epochs
        state.epoch, state.batch, state.seen, state.sums = state.epoch + 1, 0, 0, {}
        if self.ctx.data.validation is not None and (last or (every > 0 and state.epoch % every == 0)):
            entry.update(self.world.steady(self.validate))
            self._note_best(float(entry[f"validation_{self.ctx.task.primary}"]))
        patience = config.early_stop_epochs
        state.finished = last or (patience is not None and state.epochs_since_best >= patience)
        entry = {key: value for key, value in entry.items() if not (isinstance(value, float) and math.isnan(value))}
        state.history.append(entry)
        self._log_scalars({key: float(value) for key, value in entry.items() if key not in ("epoch", "step")})
        self.ctx.events.emit("epoch", stage=self.ctx.name, **entry)
        shown = ", ".join(f"{key.replace('_', ' ')} {entry[key]:.4g}" for key in
                          ("train_loss", "validation_loss", f"validation_{self.ctx.task.primary}")
                          if key in entry)  # fmt: skip
        speed = throughput(entry["samples_per_s"])
        self.ctx.log.info("%s: epoch %d of %d, %s, %s", self.ctx.name, state.epoch, config.epochs, shown, speed)

    def validate(self) -> dict[str, float]:
        """Collective. Loss and primary figure on the validation split, with the averaged weights where there are."""
        if self.ema is not None:
            with self.ema.applied():
                return self._validate()
        return self._validate()

    def _validate(self) -> dict[str, float]:
        split = self.ctx.data.validation
        assert split is not None
        self.objective.eval()
        sums = evaluate(
            self.objective.model,
            split,
            self.ctx.task,
            world=self.world,
            batch=_VALIDATION_BATCH,
            name="fit.validation",
            device=self.device,
        )
        self.objective.train()
        figures = self.ctx.task.summary(sums)
        primary = self.ctx.task.primary
        return {"validation_loss": float(figures["loss"]), f"validation_{primary}": float(figures[primary])}

    def _note_best(self, value: float) -> None:
        state = self.state
        if state.best is not None and value <= state.best:
            state.epochs_since_best += 1
            return
        state.best, state.best_step, state.epochs_since_best = value, state.step, 0
        if self.config.publish == "best":
            weights = self.ema.average if self.ema is not None else self.objective.state_dict()
            best = {key: tensor.cpu() for key, tensor in weights.items()}
            self.world.steady(lambda: self.checkpoints.save_best(best, step=state.step))

    def _settle(self) -> None:
        """Collective. The same parameters, optimizer state and buffers on every rank."""
        self.updater.settle()
        for name, buffer in self._own_buffers().items():
            buffer.copy_(self.world.allreduce(buffer, name=f"fit.buffer.{name}", op="average"))

    def _own_buffers(self) -> dict[str, Tensor]:
        """Statistics that each rank follows by itself: batch norm's, where it is not synchronised."""
        if self.world.size == 1 or self.config.sync_batchnorm:
            return {}
        return {name: buffer for name, buffer in self.objective.named_buffers() if buffer.is_floating_point()}

    def _sums(self) -> dict[str, float]:
        """Collective. This epoch's sums over all ranks."""
        if self.updater.lockstep:
            return self.state.sums
        total: dict[str, float] = {}
        for part in self.world.gather_json(self.state.sums, name="fit.sums"):
            for name, value in part.items():
                total[name] = total.get(name, 0.0) + value
        return total

    # --- 5. checkpoints ---------------------------------------------------------------------------------------------
    def save(self) -> None:
        """Collective. Write a checkpoint."""
        self.updater.settle()
        spent = self.ctx.spent()
        if self.spent_before is not None:
            spent = self.spent_before + spent
        state = self._snapshot(spent)
        own = {f"buffer.{name}": buffer.cpu() for name, buffer in self._own_buffers().items()}
        own.update({f"strategy.{name}": tensor.cpu() for name, tensor in self.updater.rank_state().items()})
        self.checkpoints.save(state, step=self.state.step, best_step=self.state.best_step, rank_state=own)
        self.last_checkpoint, self.checkpoint_due = time.monotonic(), False
        self.ctx.events.emit("checkpoint", stage=self.ctx.name, step=self.state.step, energy_kwh=spent.energy_kwh)

    def _snapshot(self, spent: Footprint) -> dict[str, Any]:
        """Collective. All that the ranks have in common: what a checkpoint, or a commit of an elastic job, holds."""
        return {
            "identity": self.identity,
            "objective": self.objective.state_dict(),
            "optimizer": self.updater.optimizer_state(),
            "ema": self.ema.average if self.ema is not None else {},
            "precision": self.precision.state(),
            "strategy": self.updater.state(),
            "fit": {**asdict(self.state), "sums": self._sums()},
            "spent": spent.to_json(),
        }

    def _resume(self) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
        """Collective. Take the newest whole checkpoint, if there is one. Gives the strategy's part of it, and this rank's own."""
        loaded = self.checkpoints.load_last()
        if self.commits is not None:
            loaded = self.commits.newer(loaded, self.world)
        if loaded is None:
            return {}, []
        saved, own = loaded
        if saved["identity"] != self.identity:
            self.ctx.log.warning("%s: a checkpoint of another version of this stage is left aside", self.ctx.name)
            return {}, []
        self.objective.load_state_dict(saved["objective"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.ema is not None:
            self.ema.average = {key: value.to(self.device) for key, value in saved["ema"].items()}
        self.precision.restore(saved["precision"])
        self.state = FitState(**{"seen": saved["fit"]["batch"] * self.global_batch, **saved["fit"]})
        self.spent_before = Footprint.from_json(saved["spent"])
        self.resumed_from = self.state.step
        self.ctx.log.info("%s: goes on from step %d of %d", self.ctx.name, self.state.step, self.total_steps)
        self.ctx.events.emit("resume", stage=self.ctx.name, step=self.state.step)
        return dict(saved["strategy"]), own

    def _restore_rank(self, states: list[dict[str, Tensor]]) -> None:
        """After ``_broadcast``: what each rank had of its own."""
        if not self.updater.lockstep and not self.world.is_main:
            self.state.sums = {}  # Rank 0 holds what all had together.
        buffers = dict(self.objective.named_buffers())
        for key, tensor in states[0].items() if states else ():
            if key.startswith("buffer."):
                buffers[key.removeprefix("buffer.")].copy_(tensor)
        parts = [
            {key.removeprefix("strategy."): tensor for key, tensor in state.items() if key.startswith("strategy.")}
            for state in states
        ]
        self.updater.restore_rank([part for part in parts if part])

    def _broadcast(self) -> None:
        """Collective. Rank 0's parameters and buffers on every rank; the optimizer's state is empty or came with the checkpoint."""
        with torch.no_grad():
            for name, tensor in self.objective.state_dict().items():
                tensor.copy_(self.world.broadcast(tensor, name=f"fit.state.{name}"))

    # --- 6. helpers -------------------------------------------------------------------------------------------------
    def _set_rate(self) -> None:
        # Where batches were of another size, a step's place in the schedule is that of its samples.
        place = self.state.epoch * self.steps_per_epoch - (-self.state.seen // self.global_batch)
        place = min(place, self.scheduled_steps - 1)
        factor = self.schedule.factor(place, total=self.scheduled_steps, steps_per_epoch=self.steps_per_epoch)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def _log_scalars(self, values: dict[str, float]) -> None:
        for name, value in {**values, "lr": self.optimizer.param_groups[0]["lr"]}.items():
            self.ctx.tracker.scalar(f"{self.ctx.name}/{name}", value, step=self.state.step)
