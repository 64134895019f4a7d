"""From text to a trained model: data, arguments, trainer, the folder of a run."""
