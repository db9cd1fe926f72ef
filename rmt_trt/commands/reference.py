"""What a bundle is compared with: the checkpoint that it was exported from, or the model out of the bundle itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rmt_trt.bundle import Bundle
from rmt_trt.errors import ContractError, FormatError

if TYPE_CHECKING:
    from rmt_trt.model.step import RMTModel


def bundle_model(bundle: Bundle, checkpoint: Path | None) -> RMTModel:
    """The model of a bundle: from `checkpoint`, else from the one beside it, else out of the bundle itself.

    Errors: FormatError, when the checkpoint holds another model or is none, or the bundle does not give its model.
    """
    from rmt_trt.export.recover import model_from_bundle

    found = checkpoint or _checkpoint_beside(bundle)
    return model_from_bundle(bundle) if found is None else _same_model(found, bundle)


def _same_model(checkpoint: Path, bundle: Bundle) -> RMTModel:
    """The checkpoint, read as the bundle was: what the export was told otherwise holds for the reference too."""
    from rmt_trt.model.checkpoint import LoadOptions, load_model

    spec = bundle.spec
    try:
        loaded = load_model(checkpoint, LoadOptions(alignment=spec.alignment, drop_ids=spec.dropped_ids))
    except (ContractError, FormatError) as err:
        if checkpoint.suffix == ".pt":
            raise
        raise FormatError(
            f"{err}. A bundle is compared with a model.pt: write one with rmt-export {checkpoint} --save-model model.pt and "
            f"the flags of the export"
        ) from err
    if loaded.spec.fingerprint != spec.fingerprint:
        raise FormatError(
            f"{checkpoint} holds other weights than {bundle.path} was exported from. Give the right checkpoint (--model), or "
            f"export again"
        )
    return loaded.model


def _checkpoint_beside(bundle: Bundle) -> Path | None:
    """The checkpoint that the manifest names, if it still lies beside the bundle."""
    name = bundle.manifest.source.get("file")
    if not isinstance(name, str) or not name or Path(name).name != name:
        return None
    path = bundle.path.resolve().parent / name
    return path if path.exists() and path.suffix == ".pt" else None
