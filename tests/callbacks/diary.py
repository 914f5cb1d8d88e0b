"""One callback, unchanged in a merge, a plain loop, an accelerate loop and a Trainer run."""

from __future__ import annotations

from mergekit_ext.callbacks import Callback


class Diary(Callback):
    """Records its calls."""

    def __init__(self):
        self.merges: list[str] = []
        self.tensors: list[str] = []
        self.steps: list[int] = []
        self.norms: list[float] = []
        self.saves: list[tuple[int, str]] = []
        self.logs: list[tuple[int, tuple[str, ...]]] = []
        self.ends: list[int] = []

    def on_merge_begin(self, event):
        self.merges.append(event.method)

    def on_tensor_merged(self, event):
        self.tensors.append(event.name)

    def on_train_begin(self, step, model):
        self.steps.append(step)

    def on_step_end(self, step, model):
        self.steps.append(step)
        self.norms.append(sum(float(p.detach().norm()) for p in model.parameters()))

    def on_log(self, step, values):
        self.logs.append((step, tuple(sorted(values))))

    def on_save(self, step, path):
        self.saves.append((step, str(path)))

    def on_train_end(self, step, model):
        self.ends.append(step)

    def state_dict(self):
        return {"steps": list(self.steps)}

    def load_state_dict(self, state):
        self.steps = list(state["steps"])
