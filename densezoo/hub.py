"""Published checkpoints as folders of the Hugging Face Hub: built, validated and shown here, sent only when asked."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from densezoo import backbones, publishing
from densezoo.checkpoints import read_checkpoint

_TASKS = {"mmdet": "object-detection", "mmseg": "image-segmentation"}
_TIMM_FILE, _CONFIG, _CARD = "model.safetensors", "config.json", "README.md"


def push_to_hub(
    source: str | Path,
    repo_id: str,
    *,
    folder: str | Path | None = None,
    card: str | Path | None = None,
    license: str | None = None,
    upload: bool = False,
    private: bool = False,
    token: str | None = None,
) -> Path:
    """Build the folder of a published checkpoint, validate its card, show what it would send, and send it if asked.

    The folder loads by `densezoo.load(folder)` and, whatever is in it of a timm model or of a detector's backbone, by
    `timm.create_model(f"local-dir:{folder}", pretrained=True)`, sent by `hf-hub:`.

    Args:
        source: What `tools/export.py checkpoint` or `tools/convert.py` wrote.
        repo_id: `owner/name` on the Hub.
        folder: Where to build; `hub/name` by default. One built before is replaced, but the card in it stays.
        card: A card (Markdown with a YAML header) to use; by default one is made of what the checkpoint's JSON says.
        license: The licence of the weights, as the Hub calls it, for the card that is made; by default that of the
            published weights where the checkpoint was converted from them.
        upload: Whether to send it; otherwise nothing leaves the machine.
        private: Whether a repository that is made for it is private.
        token: The Hub's token; the stored one by default.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: `source` or `card` is not there.
        ValueError: `repo_id`, the checkpoint or the card is not valid, or the folder holds other things.
    """
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"repo_id: got {repo_id!r}, expected owner/name")
    weights, info = publishing.find(source)
    publishing.load(source)
    folder = Path(folder) if folder is not None else Path("hub", repo_id.split("/")[1])
    files = _files(weights, info)
    if folder.exists():
        found = {path.name for path in folder.iterdir()} if folder.is_dir() else {"a file"}
        others = sorted(found - {*files, _CONFIG, _CARD})
        if others:
            raise ValueError(f"{folder}: holds something else ({others[0]}, ...); give another folder")
    if card is None and (folder / _CARD).is_file():
        card = folder / _CARD
        print(f"card: the one in {folder} stays")
    made = ModelCard(Path(card).read_text()) if card is not None else make_card(info, repo_id, license)
    check_card(made)

    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, state in files.items():
            if state is None:
                shutil.copyfile(weights, temporary / name)
            else:
                publishing.safetensors.torch.save_file(state, temporary / name, {"format": "pt"})
        entry = dict(info.get("densezoo", {}), file=next(iter(files)))
        config = dict(info, densezoo=dict(entry, sha256=publishing.sha256(temporary / entry["file"])))
        (temporary / _CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        made.save(temporary / _CARD)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _show(folder, repo_id, made)
    if not upload:
        print(f"Nothing was sent. push_to_hub(..., upload=True) sends this to {repo_id}.")
        return folder
    api = HfApi(token=token, library_name="densezoo")
    made.validate()
    api.create_repo(repo_id, private=private, exist_ok=True)
    print(f"Sent: {api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message='Add the model')}")
    return folder


def _files(weights: Path, info: Mapping) -> dict[str, Mapping | None]:
    """Return the files of weights by name, first the one that densezoo.load takes; None stands for a copy."""
    if info.get("densezoo", {}).get("library", "timm") == "timm":
        return {_TIMM_FILE: None}
    files = {weights.name: None}
    # What timm can build of it is its backbone.
    if "architecture" in info:
        state = read_checkpoint(weights)
        prefix = "backbone."
        files[_TIMM_FILE] = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return files


def make_card(info: Mapping, repo_id: str, license: str | None = None) -> ModelCard:
    """Return a card of what a published checkpoint's JSON says."""
    entry, name = info.get("densezoo", {}), repo_id.split("/")[1]
    config, architecture = entry.get("config") or {}, info.get("architecture")
    task = _TASKS.get(config.get("default_scope"), "image-classification")
    is_zoos = architecture in backbones.VARIANTS
    if license is None and entry.get("conversion"):
        license = info.get("pretrained_cfg", {}).get("license")
    data = ((entry.get("data") or {}).get("test") or {}).get("type") or "unknown"
    metrics = entry.get("metrics") or {}
    results = [
        EvalResult(task, data.lower(), data, metric.split("/")[-1], value, metric_name=metric)
        for metric, value in metrics.items()
        if isinstance(value, int | float)
    ]
    header = ModelCardData(
        license=license if license != "unknown" else None,
        library_name="densezoo",
        pipeline_tag=task,
        tags=["timm", "densezoo"] + ["openmmlab"] * bool(config),
        model_name=name if results else None,
        eval_results=results or None,
    )
    kind = (config.get("model") or {}).get("type")
    what = f"{kind} with {architecture or 'its'} as backbone" if kind else str(architecture)
    lines = [f"# {name}", "", f"{what}, trained and published with densezoo "
             f"{entry.get('code', {}).get('densezoo', '')}.".replace(" .", "."), ""]  # fmt: skip
    lines += ["```python", "import densezoo", ""]
    lines += [f'model = densezoo.load("{name}")  # this folder, downloaded', "```", ""]
    if architecture is not None:
        what = "The backbone in" if kind else "In"
        lines += [f"{what} timm:", "", "```python", "import densezoo", "import timm", ""]
        lines += [f'model = timm.create_model("hf-hub:{repo_id}", pretrained=True)', "```", ""]
    if metrics:
        rows = (f"| {key} | {value} |" for key, value in metrics.items())
        lines += ["| metric | value |", "| --- | --- |", *rows, ""]
    if is_zoos and license is None:
        lines += ["The licence of these weights is not stated.", ""]
    return ModelCard(f"---\n{header.to_yaml()}\n---\n\n" + "\n".join(lines))


def check_card(card: ModelCard) -> None:
    """Check a card's header by the library that reads it.

    Raises:
        ValueError: It is not what the Hub takes.
    """
    if not card.data.to_dict():
        raise ValueError("card: has no YAML header; expected one between two lines of ---")
    ModelCard(str(card))


def _show(folder: Path, repo_id: str, card: ModelCard) -> None:
    print(f"{folder}, for {repo_id}:")
    for path in sorted(folder.iterdir()):
        print(f"  {path.name:40} {path.stat().st_size:>14,} bytes")
    print("card's header, valid:")
    print("\n".join(f"  {line}" for line in card.data.to_yaml().splitlines()))
