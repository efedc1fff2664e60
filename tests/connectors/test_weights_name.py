"""Where the weights lie decides whether they have a name; without one, no tier may outlive the process."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvlab.connectors.vllm.weights import weights_name
from kvlab.errors import ConfigError


@pytest.fixture(autouse=True)
def _hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def config(model: str, *, load_format: str = "auto", **fields: Any) -> Any:
    """What `weights_name` reads of a VllmConfig."""
    load = {"load_format": load_format, "download_dir": None, "model_loader_extra_config": {}}
    own = {"model": model, "model_weights": "", "revision": None, "seed": 0, "hf_config": SimpleNamespace()}
    own |= {"multimodal_config": None, "tokenizer": model}
    return SimpleNamespace(
        model_config=SimpleNamespace(**{**own, **{k: v for k, v in fields.items() if k in own}}),
        load_config=SimpleNamespace(**{**load, **{k: v for k, v in fields.items() if k in load}}),
    )


def name(vllm_config: Any, *, outlives: bool = True, named: bool = False) -> str:
    return weights_name(vllm_config, outlives=outlives, named=named, loaded_here=False)


def checkpoint(folder: Path, content: bytes = b"weights", file: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(content)
    (folder / "config.json").write_text("{}")
    return folder


def in_hub(cache: Path, repo: str, content: bytes) -> None:
    """A snapshot as the hub's library lays it down, without config.json: `--download-dir` holds the weights alone."""
    base = cache / ("models--" + repo.replace("/", "--"))
    (base / "blobs").mkdir(parents=True)
    (base / "blobs" / "abc").write_bytes(content)
    (base / "snapshots" / "c0ffee").mkdir(parents=True)
    (base / "snapshots" / "c0ffee" / "model.safetensors").symlink_to(base / "blobs" / "abc")
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text("c0ffee")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "w.pt", "consolidated.00.pth"])
def test_content_names_the_weights_not_the_path(tmp_path: Path, file: str) -> None:
    a, b, c = (checkpoint(tmp_path / x, content, file) for x, content in (("a", b"1"), ("b", b"1"), ("c", b"2")))
    names = [name(config(str(folder))) for folder in (a, b, c)]
    assert names[0] == names[1] != names[2]


def test_a_gguf_file_is_a_model(tmp_path: Path) -> None:
    a = checkpoint(tmp_path / "a", b"1", "m.gguf") / "m.gguf"
    b = checkpoint(tmp_path / "b", b"2", "m.gguf") / "m.gguf"
    for load_format in ("auto", "gguf"):
        assert name(config(str(a), load_format=load_format)) != name(config(str(b), load_format=load_format))


def test_a_name_of_the_hub_means_its_snapshot(tmp_path: Path) -> None:
    in_hub(tmp_path / "hub", "org/model", b"1")
    in_hub(tmp_path / "elsewhere", "org/model", b"2")
    first = name(config("org/model"))
    assert first == name(config(str(checkpoint(tmp_path / "same", b"1"))))
    assert first != name(config("org/model", download_dir=str(tmp_path / "elsewhere")))


def test_weights_that_a_config_takes_from_elsewhere_count(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "m")
    parts = [checkpoint(tmp_path / x, content) for x, content in (("a", b"1"), ("b", b"2"))]
    names = {name(config(str(model)))}
    for field in ("text_model_id", "audio_model_id"):
        names |= {name(config(str(model), hf_config=SimpleNamespace(**{field: str(part)}))) for part in parts}
    assert len(names) == 3  # which of the two it is stands in the config, which is a field of its own


def test_tensorizer_reads_its_own_place(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "m", b"not read")
    names = set()
    for x in ("a", "b"):
        place = checkpoint(tmp_path / x, x.encode(), "model-rank-000.tensors")
        extra = {"tensorizer_uri": str(place / "model-rank-%03d.tensors")}
        names.add(name(config(str(model), load_format="tensorizer", model_loader_extra_config=extra)))
    assert len(names) == 2


UNNAMED = {
    "object storage, as the engine passes it on": {"model": "PULLED", "model_weights": "s3://bucket/model"},
    "object storage": {"model": "gs://bucket/model", "load_format": "runai_streamer"},
    "not in the hub's cache": {"model": "org/absent"},
    "quantized file of a repository": {"model": "org/name:Q4_K_M"},
    "file that is not there": {"model": "/nonexistent/model.gguf"},
    "folder without weights": {"model": "EMPTY"},
    "weights of a daemon": {"model": "FULL", "load_format": "ipc_cache"},
    "weights of a cache of its own": {"model": "FULL", "load_format": "npcache"},
    "format of a plugin": {"model": "FULL", "load_format": "my_format"},
    "remote tensors": {
        "model": "FULL",
        "load_format": "tensorizer",
        "model_loader_extra_config": {"tensorizer_uri": "s3://bucket/model.tensors"},
    },
    "second set of weights": {
        "model": "FULL",
        "load_format": "bitsandbytes",
        "model_loader_extra_config": {"qlora_adapter_name_or_path": "org/adapter"},
    },
}


@pytest.mark.parametrize("case", UNNAMED)
def test_what_has_no_name_stays_in_the_process_or_is_named_by_the_user(tmp_path: Path, case: str) -> None:
    checkpoint(tmp_path / "FULL")
    for folder in ("EMPTY", "PULLED"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
    fields = dict(UNNAMED[case])
    if fields["model"].isupper():
        fields["model"] = str(tmp_path / fields["model"])
    with pytest.raises(ConfigError, match=r"cannot be fingerprinted .*set namespace=") as caught:
        name(config(**fields))
    assert "\n" not in str(caught.value)
    assert name(config(**fields), named=True).startswith("unread:")
    assert name(config(**fields), outlives=False).startswith("process:")


def test_host_memory_alone_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of a memory tier never leave the process, which has a random name."""
    model = config(str(checkpoint(tmp_path / "m")))
    monkeypatch.setattr("kvlab.connectors.vllm.weights.files_fingerprint", None)
    first = name(model, outlives=False)
    assert first == name(model, outlives=False)
    monkeypatch.setattr("os.getpid", lambda: -1)  # as a forked child
    assert first != name(model, outlives=False)


def test_random_weights_are_named_by_their_seed() -> None:
    assert name(config("org/absent", load_format="dummy")) == "dummy:0"
    assert name(config("org/absent", load_format="dummy", seed=1)) == "dummy:1"


SEES = SimpleNamespace(mm_encoder_fp8_scale_path=None)  # the multimodal_config of a model that takes images
READ_BY_PROCESSORS = [
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "tokenizer_config.json"),
    *("params.json", "tekken.json", "audio/preprocessor_config.json", "of_a_later_version.json"),
]


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize("file", READ_BY_PROCESSORS)
def test_what_an_image_becomes_is_in_the_name(tmp_path: Path, file: str, load_format: str) -> None:
    """vLLM's own name of an image holds the model's path, the image and given options: no content of these files."""
    folders = [checkpoint(tmp_path / x) for x in "abcd"]
    for folder, content in zip(folders, ("1", "1", "2", None), strict=True):
        (folder / file).parent.mkdir(exist_ok=True)
        if content:
            (folder / file).write_text(content)
    a, b, c, without = (
        name(config(str(folder), multimodal_config=SEES, load_format=load_format)) for folder in folders
    )
    assert a == b
    assert len({a, c, without}) == 3
    texts = {name(config(str(folder), load_format=load_format)) for folder in folders}
    assert len(texts) == 1, "a model of texts reads none of them"


def test_files_that_change_no_image_are_not_in_the_name(tmp_path: Path) -> None:
    """The config's content is a field of its own; the others decide what is asked and what is generated."""
    names = set()
    for x in "ab":
        folder = checkpoint(tmp_path / x)
        for file in ("config.json", "generation_config.json", "chat_template.json", "README.md"):
            (folder / file).write_text(f'"{x}"')
        names.add(name(config(str(folder), multimodal_config=SEES)))
    assert len(names) == 1


def test_processors_are_found_where_vllm_finds_them(tmp_path: Path) -> None:
    """In the hub's own cache, also where the weights lie in another or are pulled from object storage; and in the
    tokenizer's place, if it has one."""
    in_hub(tmp_path / "elsewhere", "org/model", b"1")
    in_hub(tmp_path / "hub", "org/model", b"1")
    snapshot = tmp_path / "hub" / "models--org--model" / "snapshots" / "c0ffee"
    pulled = checkpoint(tmp_path / "pulled")
    (pulled / "model.safetensors").unlink()
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    cases = {
        snapshot: {"model": "org/model", "download_dir": str(tmp_path / "elsewhere")},
        pulled: {"model": str(pulled), "model_weights": "s3://bucket/model"},
        tokenizer: {"model": str(checkpoint(tmp_path / "m")), "tokenizer": str(tokenizer)},
    }
    for place, fields in cases.items():
        names = set()
        for content in "12":
            (place / "preprocessor_config.json").write_text(content)
            names.add(name(config(**fields, multimodal_config=SEES), named=True))
        assert len(names) == 2, place


def test_a_processor_that_has_no_name(tmp_path: Path) -> None:
    model = str(checkpoint(tmp_path / "m"))
    seeing = config(model, multimodal_config=SEES, tokenizer="org/absent")
    with pytest.raises(ConfigError, match=r"cannot be fingerprinted .*set namespace="):
        name(seeing)
    assert name(seeing, named=True) != name(config(model), named=True)
    assert name(seeing, outlives=False).startswith("process:")
    assert name(config(model, tokenizer="org/absent")) == name(config(model)), "a text's tokens are in the keys"


def test_scales_of_an_encoder_are_in_the_name(tmp_path: Path) -> None:
    model, scales = str(checkpoint(tmp_path / "m")), tmp_path / "scales.json"
    seeing = config(model, multimodal_config=SimpleNamespace(mm_encoder_fp8_scale_path=str(scales)))
    names = set()
    for content in "12":
        scales.write_text(content)
        names.add(name(seeing))
    assert len(names) == 2


def test_modelscope_keeps_models_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_hub(tmp_path / "hub", "org/model", b"1")
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "1")
    with pytest.raises(ConfigError, match="come from ModelScope"):
        name(config("org/model"))
