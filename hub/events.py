"""TensorBoard's event files without what they tell about the machine."""

import io
from pathlib import Path

from google.protobuf.message import Message
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter

from .scrub import Scrubber

_PREFIX = "events.out.tfevents"


def scrubbed_events(folder: Path, scrub: Scrubber) -> dict[str, bytes]:
    """Name -> content of every event file under `folder`. Names keep the time and lose host and process."""
    found = sorted(folder.rglob(f"{_PREFIX}.*"), key=lambda path: (_started(path), path.name))
    return {
        str((path.parent / f"{_PREFIX}.{_started(path)}.blueberry.{number}").relative_to(folder)): _rewritten(
            path, scrub
        )
        for number, path in enumerate(found)
    }


def _started(path: Path) -> int:
    """Seconds since 1970, from the file's name."""
    return int(path.name.removeprefix(f"{_PREFIX}.").split(".")[0])


def _rewritten(path: Path, scrub: Scrubber) -> bytes:
    """Every whole record; a torn one at the end (a run that was killed) is left out."""
    written = io.BytesIO()
    writer = RecordWriter(written)
    for record in RawEventFileLoader(str(path)).Load():
        event = Event.FromString(record)
        for value in event.summary.value:
            _scrub_value(value, scrub)
        writer.write(event.SerializeToString())
    return written.getvalue()


def _scrub_value(value: Summary.Value, scrub: Scrubber) -> None:
    plugin = value.metadata.plugin_data
    if plugin.plugin_name == "text":
        texts = [scrub.text(text.decode()).encode() for text in value.tensor.string_val]
        del value.tensor.string_val[:]
        value.tensor.string_val.extend(texts)
    elif plugin.plugin_name == "hparams":
        content = HParamsPluginData.FromString(plugin.content)
        _scrub_strings(content, scrub)
        plugin.content = content.SerializeToString()


def _scrub_strings(message: Message, scrub: Scrubber) -> None:
    """Every string in `message`, however deep."""
    for field, content in message.ListFields():
        if field.type == field.TYPE_STRING and not field.is_repeated:
            setattr(message, field.name, scrub.text(content))
        elif field.type == field.TYPE_MESSAGE and field.message_type.GetOptions().map_entry:
            for item in content.values():
                _scrub_strings(item, scrub)
        elif field.type == field.TYPE_MESSAGE:
            for item in content if field.is_repeated else [content]:
                _scrub_strings(item, scrub)
