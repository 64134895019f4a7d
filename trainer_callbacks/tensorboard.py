"""One logical TensorBoard log per run, in one fixed folder, that other callbacks may write into."""

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback as HFTensorBoardCallback

logger = logging.getLogger(__name__)

FOLDER = "runs"
Charts = dict[str, dict[str, list]]  # category -> chart -> ["Multiline", [regular expressions of tags]]


class RunWriter(SummaryWriter):
    """A writer into `folder` that hides what an earlier process logged there after `step`.

    A full disk costs TensorBoard, not the training run: `failure` then says what happened, and writing has ended.

    step: the step that training continues from; 0 starts over and hides everything.
    is_over: nothing is left to train: what an earlier process logged after its last step is not logged again.
    """

    def __init__(self, folder: str | os.PathLike, step: int, is_over: bool = False):
        self._steps = dict.fromkeys(scalars_at(folder, step), step) if is_over else {}  # tag -> its last step
        super().__init__(str(folder), purge_step=step + 1 if step else 0)
        self._events = _SurvivingEvents(self.file_writer.event_writer)
        self.file_writer.event_writer = self._events
        self._charts: Charts = {}

    def add_scalar(self, tag: str, value: float, global_step: int | None = None, *more: Any) -> None:
        """SummaryWriter's, once for each tag and step: the end of a run logs some again."""
        if global_step is None or self._steps.get(tag) != global_step:
            self._steps[tag] = global_step
            super().add_scalar(tag, value, global_step, *more)

    def add_charts(self, charts: Charts) -> None:
        """Add categories to the custom scalars tab; it keeps those of other callbacks."""
        self._charts |= charts
        self.add_custom_scalars(self._charts)

    @property
    def failure(self) -> str | None:
        """Why it stopped writing, if it did."""
        return self._events.failure


def scalars_at(folder: str | os.PathLike, step: int) -> list[str]:
    """The tags that a log has a value of at `step`; none where there is no log."""
    if not os.path.isdir(folder):
        return []
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    own = logging.getLogger("tensorboard")
    level = own.level
    own.setLevel(logging.ERROR)  # it warns of every resumption
    board.Reload()
    own.setLevel(level)
    found = {tag: board.Scalars(tag) for tag in board.Tags()["scalars"]}
    return [tag for tag, events in found.items() if any(event.step == step for event in events)]


def first_middle_last(layers: Iterable[int]) -> list[int]:
    """Few enough for one chart: TensorBoard draws all lines of a run in one colour."""
    found = sorted(set(layers))
    return sorted({found[0], found[len(found) // 2], found[-1]}) if found else []


class _SurvivingEvents:
    """An EventFileWriter that stops at its first OSError instead of raising it."""

    def __init__(self, events: EventFileWriter):
        self._events = events
        self.failure: str | None = None

    def add_event(self, event: Event) -> None:
        self._guarded(lambda: self._events.add_event(event))

    def flush(self) -> None:
        self._guarded(self._events.flush)

    def close(self) -> None:
        self._guarded(self._events.close)

    def get_logdir(self) -> str:
        return self._events.get_logdir()

    def _guarded(self, write: Callable[[], None]) -> None:
        if self.failure is not None:
            return
        try:
            write()
        except OSError as error:
            self.failure = f"TensorBoard stopped: could not write: {error}"
            logger.warning("%s; training goes on", self.failure)


class TensorBoardCallback(HFTensorBoardCallback):
    """transformers' TensorBoardCallback, with one log per run: `<output_dir>/runs`, resumed without repeated steps.

    `$TENSORBOARD_LOGGING_DIR` is honoured. The writer stays open after training, so that evaluations and hparams
    land in the same event file; everything is flushed at every log. Use `report_to="none"` beside it.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the writer and write the arguments and the model config as text."""
        if state.is_world_process_zero:
            self.writer(args, state)
            super().on_train_begin(args, state, control, **kwargs)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the numbers of `Trainer.log`."""
        if state.is_world_process_zero:
            self.writer(args, state)
            super().on_log(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Flush; an evaluation after training still goes into the same log."""
        if self.tb_writer is not None:
            self.tb_writer.flush()

    def close(self) -> None:
        """Write what is left and close the file, where training ended before its end."""
        if self.tb_writer is not None:
            self.tb_writer.close()

    def writer(self, args: TrainingArguments, state: TrainerState) -> RunWriter:
        """The writer of this run, opened when first asked for (rank 0 only)."""
        if self.tb_writer is None:
            self.logging_dir = self.logging_dir or os.path.join(args.output_dir, FOLDER)
            is_over = 0 < state.max_steps <= state.global_step
            self.tb_writer = RunWriter(self.logging_dir, state.global_step, is_over)
        return self.tb_writer

    def add_hparams(self, settings: Mapping[str, Any], metrics: Iterable[str]) -> None:
        """Show settings beside the last values of `metrics`, tags of logged scalars, in the HPARAMS tab.

        Through the same writer: no second event file.
        """
        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
        for summary in hparams(plain, dict.fromkeys(metrics, 0.0)):  # the tab reads the values from the scalars
            self.tb_writer.file_writer.add_summary(summary)
        self.tb_writer.flush()
