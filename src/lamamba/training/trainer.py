"""The trainer: it holds the state of a run, takes training steps, saves and restores checkpoints, and draws samples."""

import math
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed
import torch.utils.checkpoint
from torch import Tensor, nn

from lamamba.checkpoints.checkpoint import (
    CheckpointInfo,
    Distilled,
    load_checkpoint,
    load_network,
    read_info,
    verify,
)
from lamamba.checkpoints.saving import CheckpointWriter, describe_training_state, load_training_state
from lamamba.config import TrainConfig, nearest
from lamamba.data import Source, batches
from lamamba.data.latents import Latents, Space
from lamamba.diffusion import OBJECTIVES, FlowMatching, Objective, Predict, Task, draw_noise, training_losses
from lamamba.distributed.processes import GradientSums, Processes, cut_evenly
from lamamba.distributed.sharding import Division, copy_to_cpu, load
from lamamba.errors import CheckpointError, ConfigError
from lamamba.files.weights import check_weights
from lamamba.model import NETWORKS, LaMambaDiff
from lamamba.ops.linear import RoundedWeights
from lamamba.sampling import Callback, make_grid, sample, uses_bf16
from lamamba.sampling.captured import CapturedNetwork
from lamamba.sampling.guidance import guide
from lamamba.sampling.labels import why_unguided
from lamamba.training.averages import PowerAverages, power_name, save_snapshot
from lamamba.training.distillation import MomentMatching, check_teacher, student_sampler
from lamamba.training.gradients import Gradients, choose_gradients
from lamamba.training.optimizers import ADAMW_KEYS, MUON_KEYS, Muon, hidden_matrices, learning_rate, make_optimizers
from lamamba.training.transfer import transfer_weights


class Trainer:
    """A training run: the network, its EMA, the optimizer and the random state.

    Args:
        config: resolved, see `lamamba.training.run.resolve`.
        source: the images.
        space: pixels or latents.
        device: where to train.
        processes: the ranks that train together.
    """

    def __init__(
        self,
        config: TrainConfig,
        source: Source,
        space: Space,
        device: torch.device,
        processes: Processes = Processes(),  # noqa: B008 - frozen
    ) -> None:
        self.config, self.source, self.space, self.device, self.processes = config, source, space, device, processes
        self.share = processes.share(config.batch_size)
        num_parts = min(config.accumulate, config.batch_size // processes.world_size)
        self.parts = cut_evenly(self.share.stop - self.share.start, num_parts)
        self.objective = choose_objective(config)
        self.task: Task = self.objective
        least = 2 * processes.world_size
        if config.contrast and config.batch_size < least:
            raise ConfigError(f"contrast needs two images per rank: give batch_size {least} or more, or fewer ranks")
        self.images = self.step = 0
        self.skipped_in_a_row = torch.zeros((), device=device)
        # Leave the global generator of the program alone.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.network, self.average = self.build().to(device), self.build().to(device)
            self.teacher = self.build().to(device) if config.distillation else None
        if config.dropout:
            layers = [module for module in self.network.modules() if isinstance(module, nn.Dropout)]
            if not layers:
                raise ConfigError(f"dropout is {config.dropout}, but the network has no layer nn.Dropout: leave it out")
            for layer in layers:
                layer.p = config.dropout
        self.trained = nn.ModuleDict({"network": self.network})
        if config.distillation:
            self.trained["auxiliary"] = self.build().to(device)
        for name, copied in self._networks().items():
            copied.load_state_dict(self.network.state_dict())
            if name not in self.trained:
                copied.eval().requires_grad_(False)
        self.division = Division(self.network, processes if config.shard else Processes())
        for network in self._trained():
            self.division.synchronize_from_now_on(network)
        self.division.forget_others(self.average)
        self.shards = self.division.number > 1
        group = torch.distributed.new_group(backend="gloo") if self.shards else None
        self.writer = CheckpointWriter(config.out, config.keep_checkpoints, group)
        self._saved: dict[str, dict[str, Tensor]] = {name: {} for name in self._networks()}  # of the last checkpoint
        self._shells: dict[str, Any] = {}  # networks that hold the weights in `_saved` for saving
        self.power_averages = (
            PowerAverages(self.network, config.power_averages, self.division.are_own) if config.power_averages else None
        )
        self.generator = torch.Generator(device).manual_seed(config.seed)
        own = {
            f"{path}.{name}": value
            for path, network in self.trained.items()
            for name, value in self.division.select(network).items()
        }
        self.hidden: set[Tensor] = set()  # what Muon steps
        if config.optimizer == "muon":
            self.hidden.update(hidden_matrices(self.trained).values())
        self.optimizers = make_optimizers(config, self.trained, own, self.hidden, device.type in ("cpu", "cuda"))
        self.optimizer = self.optimizers[0]
        self.optimizer_of: dict[Tensor, torch.optim.Optimizer] = {
            parameter: optimizer
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        if config.gradient_checkpointing:
            # No random state has to be preserved, because dropout is off; a CUDA graph could not preserve it.
            checkpointing = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False, preserve_rng_state=False)
            for network in self._trained():
                network.enable_gradient_checkpointing(checkpointing)
        self.uses_bf16 = uses_bf16(config.precision, device)
        self.autocast = torch.autocast(device.type, torch.bfloat16) if self.uses_bf16 else nullcontext()
        rounds_ahead = self.uses_bf16 and device.type == "cuda" and not config.compile
        self.rounding: Callable[[], AbstractContextManager[None]] = (
            RoundedWeights(self.trained, torch.bfloat16).in_use if rounds_ahead else nullcontext
        )
        self.predict = self._predicts(self.network)
        if config.distillation and self.teacher is not None:
            assert config.distillation.guidance is not None
            teacher = guide(self._predicts(self.teacher), config.distillation.guidance, self.teacher.null_label)
            auxiliary = self._predicts(self.trained["auxiliary"])
            self.task = MomentMatching(config, teacher, auxiliary, device, space.bounded)
        self.gradient_sums = GradientSums(self.trained.parameters()) if processes.world_size > 1 else None
        self.captures = config.cuda_graph and device.type == "cuda"
        self.gradients: Gradients | None = None  # chosen at the first step

    def build(self) -> Any:
        """Build the network with fresh parameters: a `Denoiser` that is an `nn.Module`."""
        name, options = self.config.network_class, vars(self.config.network)
        if name not in NETWORKS:
            raise ConfigError(f"no network is named {name!r} in lamamba.model.NETWORKS: {nearest(name, NETWORKS)}")
        if name != "LaMambaDiff":
            options = {key: options[key] for key in ("in_channels", "sample_size", "num_classes")}
        return NETWORKS[name](**options)

    def _networks(self) -> dict[str, Any]:
        """Return all networks, by their folders in a checkpoint."""
        frozen = {"ema": self.average} if self.teacher is None else {"ema": self.average, "teacher": self.teacher}
        return {**self.trained, **frozen}

    def _trained(self) -> list[Any]:
        return list(self.trained.values())

    def _named_parameters(self) -> dict[str, Tensor]:
        """Return all trained parameters, by their names in a checkpoint."""
        return {name.removeprefix("network."): value for name, value in self.trained.named_parameters()}

    def _predicts(self, network: Any) -> Predict:
        """Return a function that evaluates a network as in training: with its precision, and compiled if chosen."""
        autocast, compiled = self.autocast, network
        if self.config.compile:
            compiled = torch.compile(network)

        def predict(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
            with autocast:
                out: Tensor = compiled(x_t, t, y)
            return out.to(x_t.dtype)

        return predict

    def batches(self) -> Generator[tuple[Tensor, Tensor]]:
        """Read batches, starting with the first image not yet seen."""
        return batches(
            self.source,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            start=self.images,
            horizontal_flip=self.config.horizontal_flip,
            num_workers=self.config.num_workers,
            share=self.share,
        )

    def take_step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Step the optimizer once.

        Args:
            images: (b, c, h, w) uint8, this rank's share of a batch.
            labels: (b,).

        Returns:
            The means of the loss terms over the global batch; `grad_norm`, the norm of the gradient, or the largest
            norm if several networks are trained; and `skipped`, which is 1 if that norm is not finite, so that the
            weights did not change. All ranks return the same values, because gradients are all-reduced.
        """
        if isinstance(self.task, MomentMatching) and self.task.begin_step(self.images):
            self._forget_graphs()
        inputs = self._draw(images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True))
        on_gpu = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(on_gpu, enabled=self.config.dropout > 0):
            if self.gradients is None:
                self.gradients = choose_gradients(self, inputs)
            if self.config.dropout:  # it can only use the global generator; seeded so that a resumed run repeats it
                key = np.random.SeedSequence([self.config.seed, self.images, self.processes.rank])
                torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))
            terms = self.processes.all_reduce(self.gradients(*inputs))
        limit = self.config.max_grad_norm or math.inf
        norms = [nn.utils.clip_grad_norm_(network.parameters(), limit) for network in self._trained()]
        terms["grad_norm"] = torch.stack(norms).max()  # not a number if one of them is not
        self.images += self.config.batch_size
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.config, self.images)
        terms["skipped"] = self._step_if_finite(terms["grad_norm"])
        self.step += 1
        self._update_average()
        return terms

    def add_gradients(
        self, x_0: Tensor, y: Tensor, t: Tensor, noise: Tensor, dropped: Tensor, *, reduces: bool = False
    ) -> dict[str, Tensor]:
        """Add the gradients of a part of the batch to the gradients of the parameters.

        Args:
            x_0: the images or latents. All tensors are from `_draw`.
            y: labels.
            t, noise, dropped: see `draw_noise`.
            reduces: sum all gradients over the ranks, during the backward pass.

        Returns:
            The part's contribution to the means of the loss terms: sums over its images, divided by the size of the
            global batch, so that the sizes of the parts do not matter.
        """
        number = self.config.batch_size
        sums_up = self.gradient_sums.all_reducing() if self.gradient_sums and reduces else nullcontext()
        with self.rounding(), sums_up:
            losses = training_losses(
                self.task,
                self.predict,
                x_0,
                y,
                null_label=self.network.null_label,
                label_dropout=self.config.network.label_dropout,
                drawn=(t, noise, dropped),
                min_snr_gamma=self.config.min_snr_gamma,
            )
            (losses["loss"].sum() / number).backward()
        sums = {name: loss.detach().sum() / number for name, loss in losses.items()}
        for quarter in range(4):  # of the timesteps, 0 to 1000; the loss of a quarter is its loss_q over its share_q
            here = ((t * (4 / 1000)).clamp(max=3.5).floor() == quarter).float()
            sums[f"loss_q{quarter + 1}"] = (losses["loss"].detach() * here).sum() / number
            sums[f"share_q{quarter + 1}"] = here.sum() / number
        return sums

    def _step_if_finite(self, grad_norm: Tensor) -> Tensor:
        """Step the optimizers unless the gradient is not finite; return 1 if skipped.

        Fused AdamW and Muon do not wait for the device.
        """
        skipped = (~grad_norm.isfinite()).float()
        self.skipped_in_a_row = (self.skipped_in_a_row + skipped) * skipped
        for optimizer in self.optimizers:
            if optimizer.defaults.get("fused") or isinstance(optimizer, Muon):
                optimizer.found_inf = skipped  # type: ignore[attr-defined]  # as a gradient scaler does
                optimizer.step()
            elif not skipped:
                optimizer.step()
        self.division.synchronize()
        return skipped

    def _draw(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Encode this rank's images, and draw the random tensors of a step; return x_0, y, t, noise, dropped.

        They are drawn for the global batch, so that they do not depend on the number of ranks or parts.
        """
        network = self.config.network
        shape = (self.config.batch_size, network.in_channels, network.sample_size, network.sample_size)
        latent_noise = None
        if isinstance(self.space, Latents):
            latent_noise = torch.randn(shape, device=self.device, generator=self.generator)[self.share]
        if self.config.distillation:
            shape = (shape[0], 2 * shape[1], *shape[2:])
        drawn = draw_noise(self.task, shape, self.device, label_dropout=network.label_dropout, generator=self.generator)
        return self.space.encode(images, latent_noise), labels, *(tensor[self.share] for tensor in drawn)

    @torch.no_grad()
    def _update_average(self) -> None:
        # The decay starts low and grows, so that the EMA forgets the initial weights in short runs too.
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        average, network = (list(self.division.select(each).values()) for each in (self.average, self.network))
        torch._foreach_lerp_(average, network, 1 - decay)
        if self.power_averages:
            self.power_averages.update(self.network, self.step)

    def close(self) -> None:
        """Wait for the checkpoint being written, and free the CUDA graphs, since NCCL waits for graphs that use it."""
        self.writer.close()
        self._forget_graphs()

    def _forget_graphs(self) -> None:
        if self.gradients and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a graph may still run
        for graph in self.gradients.graphs.values() if self.gradients else ():
            graph.forget()
        self.gradients = None

    def is_finite(self) -> bool:
        finite = torch.stack([tensor.isfinite().all() for tensor in self.trained.parameters()]).all()
        return not self.processes.all_reduce_max(int(not finite))

    def info(self) -> CheckpointInfo:
        vae = str(self.config.vae.resolve()) if self.config.vae else None
        names = self.source.class_names
        return CheckpointInfo(self.images, self.step, self.config.objective, names, vae, self._distilled())

    def _distilled(self) -> Distilled | None:
        options = self.config.distillation
        if options is None:
            return None
        guidance = 1.0 if options.guidance is None else options.guidance
        return Distilled(options.steps, student_sampler(self.objective), guidance)

    def save(self) -> None:
        """Start writing a checkpoint; `writer.finish` waits for it. Raises CheckpointError."""
        self.writer.finish()  # the writer still reads the memory to which the weights are copied now
        state = {"random_state": self.generator.get_state()}
        for name, parameter in self._named_parameters().items():
            if optimizer := self.optimizer_of.get(parameter):  # else it belongs to another rank
                for key, value in optimizer.state.get(parameter, {}).items():
                    state[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
        if self.power_averages:
            state |= {f"power.{name}": value for name, value in self.power_averages.state_dict().items()}
        networks = {}
        with self.division.completed(self.average):
            for name, network in self._networks().items() if self.processes.is_first else ():
                networks[name] = self._to_save(name, copy_to_cpu(network.state_dict(), self._saved[name]))
        if self.processes.is_first or self.shards:
            self.writer.begin(self.info(), networks, state)

    def save_snapshot(self) -> None:
        """Write a snapshot of the power function EMAs, if there are any; raises CheckpointError."""
        if not self.power_averages:
            return
        own, averages = self.power_averages.state_dict(), dict[str, Tensor]()
        for sigma_rel in self.power_averages.sigma_rels:
            names = [power_name(sigma_rel, name) for name, _ in self.network.named_parameters()]
            complete = self.division.complete([own.get(name, self.skipped_in_a_row.new_empty(0)) for name in names])
            averages |= zip(names, complete, strict=True)
        if self.processes.is_first:
            save_snapshot(self.config.out, averages, self.step, self.images)

    def _to_save(self, name: str, weights: Mapping[str, Tensor]) -> Any:
        """Put weights into a network that all checkpoints reuse: the writer has finished the previous checkpoint."""
        if name not in self._shells:
            self._shells[name] = self._empty_network()
        self._shells[name].load_state_dict(weights, assign=True)
        return self._shells[name]

    def _empty_network(self) -> Any:
        with torch.device("meta"):
            return self.build()

    def restore(self, checkpoint: Path) -> None:
        """Continue from a checkpoint as if the run had never stopped; raises CheckpointError."""
        verify(checkpoint)
        info = read_info(checkpoint)
        for name, network in self._networks().items():
            if name == "auxiliary" and not (checkpoint / name).is_dir():
                raise CheckpointError(
                    f"{checkpoint} is from an earlier version, which used another method: distill again"
                )
            weights = load_network(checkpoint / name).state_dict()
            check_weights(checkpoint / name, self._empty_network().state_dict(), weights)
            load(network, weights)
        state, optimizer_state = self._empty_state(checkpoint)
        load_training_state(checkpoint, state, self.writer.group)
        self.generator.set_state(state["random_state"])
        for parameter, moments in optimizer_state.items():
            self.optimizer_of[parameter].state[parameter] = moments
        self.images, self.step = info.images, info.step

    def _empty_state(self, checkpoint: Path) -> tuple[dict[str, Tensor], dict[Tensor, dict[str, Tensor]]]:
        """Allocate the tensors into which a checkpoint's training state is read, by name; and the optimizer's state.

        On disk, the optimizer's state is stored by parameter name, so that it does not depend on parameter groups.
        """
        saved = describe_training_state(checkpoint)
        state, optimizer_state = {"random_state": torch.empty_like(self.generator.get_state())}, {}
        of_others: dict[str, Tensor] = {}  # what other ranks read; its shapes are checked here, too
        for name, parameter in self._named_parameters().items():
            keys = MUON_KEYS if parameter in self.hidden else ADAMW_KEYS
            if f"optimizer.{keys[0]}.{name}" not in saved:
                continue  # it had no gradient yet
            device = self.device if parameter in self.optimizer_of else "meta"
            moments = {
                key: torch.zeros(() if key == "step" else parameter.shape, dtype=parameter.dtype, device=device)
                for key in keys
            }
            named = {f"optimizer.{key}.{name}": value for key, value in moments.items()}
            if parameter in self.optimizer_of:
                optimizer_state[parameter], state = moments, state | named
            else:
                of_others |= named
        if self.power_averages:
            own = self.power_averages.state_dict()
            state |= {f"power.{name}": value for name, value in own.items()}
            for sigma_rel in self.power_averages.sigma_rels:
                for name, value in self._empty_network().named_parameters():
                    if power_name(sigma_rel, name) not in own:
                        of_others[f"power.{power_name(sigma_rel, name)}"] = value
        if "random_state" in saved and saved["random_state"].shape != state["random_state"].shape:
            raise CheckpointError(
                f"{checkpoint} was written on another kind of device than {self.device}: resume on that kind"
            )
        check_weights(checkpoint / "training", state | of_others, saved)
        return state, optimizer_state

    def begin_with(self, name: str) -> list[str]:
        """Copy all EMA weights that fit from a run, a checkpoint or shipped weights.

        Returns:
            A line for each thing that could not simply be copied.

        Raises:
            CheckpointError: nothing can be loaded, or it was trained with another objective.
        """
        loaded = load_checkpoint(name)
        if not (isinstance(self.network, LaMambaDiff) and isinstance(loaded.network, LaMambaDiff)):
            raise CheckpointError(f"{name} cannot be transferred: only from a LaMambaDiff to another LaMambaDiff")
        options = self.config.distillation
        objective = options.teacher_objective if options else self.config.objective
        if loaded.info.objective != objective:
            raise CheckpointError(
                f"{name} was trained with the objective {loaded.info.objective}: give objective {loaded.info.objective}"
            )
        if options:
            check_teacher(name, loaded, self.config, self.source.class_names)
        network = self._empty_network()
        network.load_state_dict(copy_to_cpu(self.network.state_dict()), assign=True)
        notes = transfer_weights(network, loaded.network, self.source.class_names, loaded.info.class_names)
        for own in self._networks().values():
            load(own, network.state_dict())
        if options and options.teacher_objective != self.config.objective and not self.space.bounded:
            notes.append("it predicts noise, which has not been tested with latents: check the first sample grids")
        return notes

    def draw_samples(self, callback: Callback | None = None) -> Any:
        """Sample a grid from the EMA, with the same seeds every time; `callback` is that of `sample`.

        There is one row for each of the first ten classes, with its name; without classes there are two rows. Rank 0
        draws. If the EMA is sharded, all ranks call this; the others return None.
        """
        rows = min(self.config.network.num_classes, 10)
        columns = max(2, min(10, 20 // max(rows, 1)))
        labels = [row for row in range(rows) for _ in range(columns)] or [0] * 2 * columns
        own = self._distilled()
        with self.division.completed(self.average):
            if not self.processes.is_first:  # it has only helped to complete the EMA
                return None
            x = sample(
                CapturedNetwork(self.average, captures=False),
                self.objective,
                labels,
                list(range(len(labels))),
                sampler=own and own.sampler,
                num_steps=own.steps if own else self.config.sample_steps,
                guidance_scale=1.0 if why_unguided(self.config.network) else self.config.sample_guidance,
                clip_sample=self.space.bounded,
                callback=callback,
            )
        images = self.space.decode(x).cpu().numpy()
        names = self.source.class_names[:rows]
        return make_grid(images, columns, row_names=names)


def choose_objective(config: TrainConfig) -> Objective:
    """Choose the objective of a run, with the options that only training uses."""
    if config.objective not in OBJECTIVES:
        raise ConfigError(f"no objective is named {config.objective!r}: {nearest(config.objective, OBJECTIVES)}")
    kind = OBJECTIVES[config.objective]
    if config.timesteps != "uniform" or config.contrast:
        return type(cast(FlowMatching, kind))(config.timesteps, config.contrast, config.timestep_logits)
    return kind
