"""What happens between the steps of a fine-tune: the end at NaN, the end at Ctrl-C, the progress bar."""

import contextlib
import signal
import sys

from tqdm.auto import tqdm

from qlab.models.guard import guard_bitsandbytes
from qlab.models.load import quiet

guard_bitsandbytes()
with quiet():  # importing Trainer imports every quantization library that is installed, with its notices
    from transformers import TrainerCallback


class StopAtNaN(TrainerCallback):
    """A loss that is NaN stays NaN: the run ends, with the checkpoint before it."""

    def on_log(self, args, state, control, logs=None, **_):
        for name in ("loss", "grad_norm"):
            value = float(logs.get(name, 0.0))
            if value != value or abs(value) == float("inf"):
                raise ValueError(
                    f"the {name} is {value} at step {state.global_step}: the training has diverged. Lower the learning rate "
                    f"({args.learning_rate:g}), in a new folder"
                )


class StopAtInterrupt(TrainerCallback):
    """The first Ctrl-C ends the run after the step that is being taken, with a checkpoint; a second one ends it at once."""

    asked = False

    @contextlib.contextmanager
    def listening(self):
        before = signal.signal(signal.SIGINT, self._interrupted)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _interrupted(self, *_) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_end(self, args, state, control, **_):
        if self.asked:
            control.should_save = control.should_training_stop = True


class Bar(TrainerCallback):
    """A progress bar on stderr: steps, the last loss, the last scores."""

    def on_train_begin(self, args, state, control, **_):
        self.shown = {}
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", file=sys.stderr, mininterval=1)

    def on_step_end(self, args, state, control, **_):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **_):
        values = {
            name.removeprefix("eval_"): logs[name] for name in logs if name.startswith("eval_") and name != "eval_loss"
        }
        values |= {"loss": logs["loss"]} if "loss" in logs else {}
        self.shown |= {name: f"{value:.4g}" for name, value in values.items()}
        self.bar.set_postfix(self.shown, refresh=False)

    def on_train_end(self, args, state, control, **_):
        self.bar.close()
