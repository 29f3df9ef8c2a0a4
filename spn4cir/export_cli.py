"""``spn4cir-export``: a model for others."""

import argparse
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from spn4cir.cli import Parser
from spn4cir.errors import InputError, run_command

EMBEDDED = "embedded"


def _export() -> None:
    parser = Parser(
        "spn4cir-export",
        "Write a model for onnxruntime or sentence-transformers, or upload it; each export is compared with the model.",
        "examples:\n"
        "  spn4cir-export                                        # the model card of the newest run, README.md\n"
        "  spn4cir-export --onnx exported --run runs/emoji/clip4cir/stage2-20260101-123000\n"
        "  spn4cir-export --sentence-transformers exported --run embedded\n"
        "  spn4cir-export --push-to-hub OWNER/NAME --private\n"
        "needs: pip install 'spn4cir[export]' for --onnx and --sentence-transformers",
    )
    add = parser.add_argument
    add("--run", help=f"run or checkpoint folder, or {EMBEDDED} (default: the newest run, else {EMBEDDED})")
    add("--onnx", metavar="DIR", type=Path, help="write ONNX graphs, tokenizer and preprocessing")
    what = "write a model for SentenceTransformer(DIR, trust_remote_code=True)"
    add("--sentence-transformers", metavar="DIR", type=Path, help=what)
    add("--push-to-hub", metavar="OWNER/NAME", help="upload the model and its card to the Hugging Face hub")
    add("--private", action="store_true", help="with --push-to-hub: a repository that is made is private")
    args = parser.parse_args()
    _check_arguments(args)
    with ExitStack() as stack:
        _export_run(args, stack)


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuse before any work what cannot succeed."""
    if args.private and args.push_to_hub is None:
        raise InputError("--private is for --push-to-hub OWNER/NAME")
    if args.run == "":
        raise InputError(f"--run is empty: give a run or checkpoint folder, or {EMBEDDED}")
    if args.push_to_hub is not None:
        from spn4cir.export.hub import check_hub_id

        check_hub_id(args.push_to_hub)
    if args.onnx and args.sentence_transformers and args.onnx.resolve() == args.sentence_transformers.resolve():
        raise InputError(f"--onnx and --sentence-transformers both name {args.onnx}: give each a folder of its own")


export_command = partial(run_command, _export)


def _export_run(args: argparse.Namespace, stack: ExitStack) -> None:
    from spn4cir.export import require_packages

    if args.onnx:
        require_packages("onnx", "onnxscript", "onnxruntime", "tokenizers")
    if args.sentence_transformers:
        require_packages("sentence_transformers")
    from spn4cir.backbones import check_backbone
    from spn4cir.checkpoints import read_model, read_note
    from spn4cir.model_card import CARD, write_card

    folder = _find_run(args.run)
    print(f"model {folder or 'embedded weights, not trained on any triplet'}", flush=True)
    if folder is None:
        if not (args.onnx or args.sentence_transformers or args.push_to_hub):
            raise InputError("there is no run to write a model card of: train one, or give --run FOLDER")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _save_embedded(folder)
    check_backbone(read_model(folder)[0])  # raises for a damaged model, as does the next line
    read_note(folder / "model.safetensors")
    note = write_card(folder)
    print(note or f"model card {folder / CARD}", flush=True)
    if args.onnx or args.sentence_transformers:
        _write_exports(args, folder)
    if args.push_to_hub:
        from spn4cir.export.hub import push_to_hub

        print(f"uploaded to {push_to_hub(folder, args.push_to_hub, args.private)}")


def _find_run(given: str | None) -> Path | None:
    """The folder to export; None for the embedded weights. Raises ``InputError`` if the named one is missing."""
    from spn4cir.checkpoints import newest_run, runs_root

    if given == EMBEDDED and not Path(given).is_dir():
        return None
    if given is None:
        return newest_run(*runs_root().glob("*"), *runs_root().glob("*/*"))
    if not Path(given).is_dir():
        raise InputError(f"--run {given} is missing: give a run or checkpoint folder, or {EMBEDDED}")
    return Path(given)


def _save_embedded(folder: Path) -> None:
    from spn4cir.checkpoints import save_model
    from spn4cir.model import load

    save_model(folder, load(EMBEDDED, device="cpu").backbone, {})


def _write_exports(args: argparse.Namespace, folder: Path) -> None:
    from spn4cir.export.export_cards import write_onnx_card, write_sentence_transformers_card
    from spn4cir.export.hub import find_local_folder
    from spn4cir.model import load

    model = load(folder, device="cpu")
    if args.onnx:
        from spn4cir.export.onnx import export_onnx

        difference = export_onnx(model, args.onnx)
        write_onnx_card(folder, args.onnx)
        print(f"{args.onnx}: ONNX; largest difference from the model {difference:.1g}", flush=True)
    if args.sentence_transformers:
        from spn4cir.export.sentence_transformers import export_sentence_transformers

        difference = export_sentence_transformers(model, args.sentence_transformers)
        write_sentence_transformers_card(folder, args.sentence_transformers)
        accuracy = f"largest difference from the model {difference:.1g}"
        print(f"{args.sentence_transformers}: sentence-transformers; {accuracy}", flush=True)
        if place := find_local_folder(model.backbone.options):
            print(f"it reads its architecture from {place}: others need that folder, too")
