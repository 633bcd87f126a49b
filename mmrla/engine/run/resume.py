"""Training that survives kills: atomic checkpoints, and runs that resume exactly.

All randomness of a training step is a function of the seed and the step's number, and that of a
sample is a function of the seed, the process, the epoch and its place in it. So no random number
generator states have to be saved, and the number of dataloader workers does not matter and may
change.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_reduce_params, get_rank, is_main_process
from mmengine.fileio import get_file_backend
from mmengine.hooks import CheckpointHook, SyncBuffersHook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from mmrla.checkpoints.atomic import BACKEND, AtomicLocalBackend, latest_intact, remove_temporaries
from mmrla.registry import HOOKS, LOOPS

_META = "mmrla_data"
# Tell the streams of random numbers of steps and of samples apart.
_STEP, _SAMPLE = 0, 1


def _seeds(*key: int) -> tuple[int, int, int]:
    words = np.random.SeedSequence(key).generate_state(3)
    return int(words[0]), int(words[1]), int(words[2])


class SeededBatch:
    """The indices of a batch; iterating over them seeds the generators for each sample.

    A worker and the training process get the same random augmentations when they load the samples
    in order. Afterwards the states of random, numpy and torch (CPU) are restored.

    Args:
        indices: Of the samples.
        key: Seed, process, epoch and batch number.
    """

    def __init__(self, indices: Sequence[Any], key: tuple[int, ...]) -> None:
        self.indices = list(indices)
        self.key = key

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Any]:
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            for place, index in enumerate(self.indices):
                first, second, third = _seeds(_SAMPLE, *self.key, place)
                random.seed(first)
                np.random.seed(second)
                torch.default_generator.manual_seed(third)  # not the GPU's
                yield index
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])


class ResumableBatches:
    """A batch sampler that can start in the middle of an epoch, with a seed for every sample.

    Args:
        batches: The batch sampler that it wraps.
    """

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self.key: tuple[int, ...] = (0, 0, 0)
        self.skip = 0

    @property
    def sampler(self) -> Any:
        """The sampler of single samples, for hooks that set its epoch."""
        return self.batches.sampler

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "batches":
            raise AttributeError(name)
        return getattr(self.batches, name)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[SeededBatch]:
        key, skip = self.key, self.skip
        for number, indices in enumerate(self.batches):
            if number >= skip:
                yield SeededBatch(indices, (*key, number))


@LOOPS.register_module()
class ResumableTrainLoop(EpochBasedTrainLoop):
    """mmengine's loop over epochs, which can resume in the middle of an epoch.

    A run that resumes, also from a checkpoint inside an epoch
    (``AtomicCheckpointHook(by_epoch=False)``), sees the same batches with the same augmentations
    and draws the same random numbers as an uninterrupted run. It cannot handle datasets with their
    own generators and datasets that remember earlier samples (mmdet's ``CachedMosaic``).

    Args:
        runner: The runner.
        dataloader: The dataloader or its config; one over batches, of a dataset with indices.
        **kwargs: As in :class:`mmengine.runner.EpochBasedTrainLoop`.

    Raises:
        ValueError: The dataloader makes no batches of indices.
    """

    _epoch: int
    _iter: int

    def __init__(self, runner: Runner, dataloader: DataLoader | dict, **kwargs: Any) -> None:
        super().__init__(runner, dataloader, **kwargs)
        batches = self.dataloader.batch_sampler
        if batches is None:
            raise ValueError(
                "ResumableTrainLoop needs a dataloader over batches of indices; for this one take "
                "train_cfg.type='EpochBasedTrainLoop'"
            )
        if not isinstance(batches, ResumableBatches):
            batches = ResumableBatches(batches)
            # Past the dataloader's guard: a new one would lose batch_size and sampler, which hooks
            # read. It looks its batch sampler up when an epoch begins.
            self.dataloader.__dict__["batch_sampler"] = batches
        self._batches = batches

    def run_epoch(self) -> None:
        """Run the rest of one epoch."""
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        done = self._done_in_epoch()
        self._batches.key = (int(self.runner.seed), get_rank(), self._epoch)
        self._batches.skip = done
        for index, data_batch in enumerate(self.dataloader, start=done):
            self.run_iter(index, data_batch)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1

    def run_iter(self, idx: int, data_batch: Sequence[dict]) -> None:
        """Run one training step, with its own random seed."""
        first, second, third = _seeds(_STEP, int(self.runner.seed), self._iter)
        random.seed(first)
        np.random.seed(second)
        torch.manual_seed(third)
        super().run_iter(idx, data_batch)

    def _done_in_epoch(self) -> int:
        length = len(self.dataloader)
        done = self._iter - self._epoch * length
        if 0 <= done <= length:
            return done
        # Another batch size or number of processes: there is no such place.
        print_log(
            f"iteration {self._iter} is not in epoch {self._epoch + 1} of {length} batches: "
            "the checkpoint is from a run with other batches. The epoch starts from its beginning.",
            logger="current",
            level=logging.WARNING,
        )
        self._iter = self._epoch * length
        return 0


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's checkpoint hook, safe against kills and full disks.

    A checkpoint appears under its name only when it is completely on disk, ``last_checkpoint``
    likewise, and older ones are removed only then. A run that resumes without naming a file takes
    the newest intact one. With :class:`ResumableTrainLoop` it ends with the weights of an
    uninterrupted run, on the CPU bit for bit; with another loop it does not, and a warning is
    logged.

    If mmengine's ``SyncBuffersHook`` averages the processes' norm statistics at the end of an
    epoch, a checkpoint within an epoch averages them too: otherwise it would only contain those of
    the first process, and the others' would be lost.

    Args:
        **kwargs: As in :class:`mmengine.hooks.CheckpointHook`. With ``backend_args``,
            ``file_client_args`` or a remote ``out_dir``, writing is left to that backend.

    Raises:
        mmrla.checkpoints.files.CheckpointError: A checkpoint cannot be written, with the path, its
            size and the free space; or all checkpoints to resume from are damaged.
    """

    backend_args: dict[str, Any] | None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._written: list[str] = []
        self._resumed: dict[str, Any] | None = None

    def before_run(self, runner: Runner) -> None:
        """Choose the file backend and the checkpoint to resume from."""
        remote = "://" in str(self.out_dir or runner.work_dir)
        if self.backend_args is None and self.file_client_args is None and not remote:
            self.backend_args = dict(backend=BACKEND)
        if runner._resume and runner._load_from is None:
            runner._load_from = latest_intact(runner.work_dir)
            if runner._load_from is None:
                runner.logger.warning(f"No checkpoint in {runner.work_dir}: from the beginning")
                runner._resume = False

    def before_train(self, runner: Runner) -> None:
        """As the ancestor's; cleans up after a kill and warns if the result will differ."""
        super().before_train(runner)
        if isinstance(self.file_backend, AtomicLocalBackend) and is_main_process():
            for path in (*remove_temporaries(self.out_dir), *remove_temporaries(runner.work_dir)):
                runner.logger.info(f"Removed what a killed run had half written: {path}")
        if self._resumed is not None:
            self._warn_of_differences(runner, self._resumed)
        self._warn_of_accumulation(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Save the state that determines the next data."""
        sampler = _sampler(runner)
        seed = getattr(sampler, "seed", None)
        checkpoint["meta"][_META] = dict(
            sampler_seed=seed if isinstance(seed, int) else None,
            world_size=runner.world_size,
            batches=len(runner.train_dataloader),
        )

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Set the sampler's seed to that of the resumed run; otherwise each run draws its own."""
        if not runner._resume:
            return
        self._resumed = dict(checkpoint.get("meta", {}).get(_META) or {})
        seed = self._resumed.get("sampler_seed")
        if seed is not None and hasattr(_sampler(runner), "seed"):
            _sampler(runner).seed = seed

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        if not self.by_epoch and any(isinstance(hook, SyncBuffersHook) for hook in runner.hooks):
            all_reduce_params(runner.model.buffers(), op="mean")  # nothing in a single process
        # As the ancestor's, but what is new is safe before anything old goes.
        expired = []
        if self.max_keep_ckpts > 0 and step not in list(self.keep_ckpt_ids)[-1:]:
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                expired.append(self.keep_ckpt_ids.popleft())
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        self._written.append(self.last_ckpt)
        if not is_main_process():
            return
        local = get_file_backend(backend_args=dict(backend=BACKEND))
        local.put_text(self.last_ckpt, local.join_path(runner.work_dir, "last_checkpoint"))
        for number in expired:
            path = self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(number))
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)
            elif self.file_backend.isdir(path):
                self.file_backend.rmtree(path)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict[str, Any]) -> None:
        self._written = []
        if not isinstance(self.file_backend, AtomicLocalBackend):
            super()._save_best_checkpoint(runner, metrics)
            return
        with self.file_backend.removing_last(self._written):
            super()._save_best_checkpoint(runner, metrics)
            if self.save_best:
                best = [getattr(self, "best_ckpt_path", None)]
                best += list(getattr(self, "best_ckpt_path_dict", {}).values())
                self._written += [path for path in best if path]

    def _warn_of_differences(self, runner: Runner, saved: dict[str, Any]) -> None:
        reasons = []
        if not isinstance(runner.train_loop, ResumableTrainLoop):
            reasons.append(
                "the training loop is no mmrla.ResumableTrainLoop, so augmentations and other "
                "random numbers differ, and an epoch that was begun starts again"
            )
        if not saved:
            reasons.append("the checkpoint does not say which data come next")
        elif saved["world_size"] != runner.world_size:
            reasons.append(f"it was saved by {saved['world_size']} processes")
        elif saved["batches"] != len(runner.train_dataloader):
            reasons.append(f"it was saved with {saved['batches']} batches per epoch")
        if reasons:
            runner.logger.warning(
                "The run goes on, but not as if it had never been stopped: " + "; ".join(reasons)
            )

    def _warn_of_accumulation(self, runner: Runner) -> None:
        wrapper = runner.optim_wrapper
        count = wrapper._accumulative_counts if isinstance(wrapper, OptimWrapper) else 1
        every = self.interval * (len(runner.train_dataloader) if self.by_epoch else 1)
        if count > 1 and self.interval > 0 and every % count:
            runner.logger.warning(
                f"A checkpoint every {every} iterations falls between the {count} that "
                "accumulative_counts gathers gradients over; those gathered so far are not saved, "
                "so a run resumed there differs a little"
            )


def _sampler(runner: Runner) -> Any:
    loader = runner.train_dataloader
    return getattr(loader.batch_sampler, "sampler", None) or loader.sampler
