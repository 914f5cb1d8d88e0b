"""Snapshots of the adapter of a PeftModel: folders that PEFT reads, merged as changes by
`peft_merge`, never A and B apart."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_ext.callbacks.settings import Mean, Settings
from mergekit_ext.core.parameters import AUTO
from mergekit_ext.declared.method import factor_of_snapshots
from mergekit_ext.errors import Problem

if TYPE_CHECKING:
    from peft_merge import Adapter

# The adapter that merged weights become in the live model, and while they are evaluated.
LOADED, _CANDIDATE = "merged", "merged_candidate"


class AdapterModel:
    """One adapter: its factors or vectors, and the whole tensors that it carries."""

    base: Path | None = None  # the frozen model is the base

    def __init__(self, settings: Settings):
        self._settings = settings
        self.trained = settings.adapter or ""

    def problems(self, model: Any) -> Iterable[Problem]:
        """Yield why snapshots cannot be taken; decides which adapter is the trained one."""
        known, active = ", ".join(model.peft_config), model.active_adapters
        if self.trained and self.trained not in model.peft_config:
            yield Problem("adapter", repr(self.trained), f"one of {known}")
        if not self.trained and len(active) != 1:
            yield Problem("adapter", f"the active adapters {active}", f"one of {known}")
        if LOADED in model.peft_config:
            expected = "another name, because the merged adapter is called so"
            yield Problem("model", f"an adapter called {LOADED!r}", expected)
        if self._settings.base is not None:
            expected = "nothing: adapters are merged as changes of the model's frozen weights"
            yield Problem("base", "a base", expected, "Leave it out.")
        self.trained = self.trained or active[0]

    def save(self, model: Any, folder: Path) -> None:
        from peft_merge import save_adapter

        save_adapter(self._adapter(model), folder)

    def merge_problems(self, folders: Mapping[int, Path], base: Path | None) -> list[Problem]:
        from peft_merge.merge import check

        given = self._settings
        plan = check(self._document(folders), device=given.device)
        if plan.rule is None:
            return [Problem("method", repr(given.method), "a method that makes one adapter")]
        return []

    def merge(self, folders: Mapping[int, Path], base: Path | None, out: Path) -> None:
        from peft_merge import run_config

        given = self._settings
        run_config(self._document(folders), out, device=given.device, callbacks=given.callbacks)

    def load(self, model: Any, folder: Path) -> None:
        """Add the merged adapter and make it the active one; the trained one stays."""
        if LOADED in model.peft_config:
            model.delete_adapter(LOADED)
        _add(model, folder, LOADED)

    @contextmanager
    def loaded(self, model: Any, folder: Path) -> Iterator[None]:
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        active = model.active_adapter
        try:
            _add(model, folder, _CANDIDATE)
            yield
        finally:
            model.set_adapter(active)
            if _CANDIDATE in model.peft_config:
                model.delete_adapter(_CANDIDATE)
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)

    def blend(self, mean: Mean | None, model: Any, weight: float) -> Mean:
        """Blend products, in float64 and without loss of rank.

        The rank grows with every snapshot, up to that of the adapted matrices.
        """
        adapters, weights = {"new": self._adapter(model)}, [weight]
        if mean is not None:
            adapters["mean"] = _of_mean(mean)
            weights.append(1 - weight)
        is_ia3 = adapters["new"].config["peft_type"] == "IA3"
        return self._linear(adapters, weights, **({} if is_ia3 else {"rank": "lossless"}))

    def save_mean(self, mean: Mean, model: Any, out: Path) -> None:
        """Write a mean into an empty folder, cut to `rank` if that is given."""
        from peft_merge import save_adapter
        from peft_merge.io.write import state_dict

        given = self._settings.adapter_options
        merged = self._linear({"mean": _of_mean(mean)}, [1.0], **given)
        if "dtype" not in given:
            live = state_dict(self._adapter(model))
            for name, tensor in merged.tensors.items():
                merged.tensors[name] = tensor.to(live[name].dtype)
        save_adapter(_of_mean(merged), out)

    def _adapter(self, model: Any) -> "Adapter":
        from peft_merge.io.read import adapters_of

        return adapters_of(model, [self.trained])[0]

    def _document(self, folders: Mapping[int, Path]) -> dict[str, Any]:
        from peft_merge.modules import rules

        given = self._settings
        rule = rules().get(given.method)
        defaults = {p.name: p.default for p in rule.parameters} if rule else {}
        factor = factor_of_snapshots(defaults) if rule else ""
        return {
            "merge_method": "linear" if given.running else given.method,
            "models": [{"model": str(f), "name": f"step-{step}"} for step, f in folders.items()],
            "parameters": {
                **({factor: AUTO} if factor else {}),
                **({} if given.running else given.parameters),
            },
            "seed": given.seed,
            # Heads at different times of one training are heads of one task.
            "modules_to_save": "average",
            **given.adapter_options,
        }

    def _linear(
        self, adapters: "Mapping[str, Adapter]", weights: Sequence[float], **options: Any
    ) -> Mean:
        from peft_merge import merge_adapters
        from peft_merge.io.write import state_dict

        saved = self._settings.adapter_options.get("modules_to_save", "average")
        merged = merge_adapters(
            adapters,
            weights=weights,
            parameters={"normalize": False},
            device=self._settings.device,
            **{"dtype": "float64", "modules_to_save": saved, **options},
        ).adapter
        return Mean(tensors=state_dict(merged), config=dict(merged.config))


def adapter_folder(checkpoint: Path, adapter: str | None) -> Path:
    """Return where in a checkpoint an adapter is: PEFT makes a folder of each but `default`."""
    place = checkpoint / (adapter or "")
    own = adapter != "default" and (place / "adapter_config.json").exists()
    return place if own else checkpoint


def _add(model: Any, folder: Path, name: str) -> None:
    from peft_merge import load_adapter
    from peft_merge.live import add_adapter

    add_adapter(model, name, load_adapter(folder))
    model.set_adapter(name)


def _of_mean(mean: Mean) -> "Adapter":
    from peft_merge.io.read import of_memory

    return of_memory("mean", mean.config or {}, mean.tensors, "state.mean")
