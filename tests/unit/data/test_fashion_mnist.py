import gzip
import hashlib
import http.server
import multiprocessing
import threading
from pathlib import Path

import pytest
import torch

from horovod_jobs.data import fashion_mnist as module
from horovod_jobs.data.download import download_all
from horovod_jobs.data.fashion_mnist import fashion_mnist
from horovod_jobs.data.idx import parse_idx
from horovod_jobs.errors import ConfigError, DataError, StorageError


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(extent.to_bytes(4, "big") for extent in array.shape)
    return header + array.numpy().tobytes()


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A small stand-in for the four files, and the module told to expect it and to find nothing else."""
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "published"
    folder.mkdir()
    digests = {}
    for prefix, count in (("train", 40), ("t10k", 10)):
        images = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8, generator=generator)
        images[:, 0, 0] = torch.arange(count)  # so that a test can tell the pictures apart
        labels = torch.arange(count, dtype=torch.uint8) % 10
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx(array)
            digests[f"{prefix}-{name}-ubyte.gz"] = hashlib.sha256(content).hexdigest()
            (folder / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(module, "SHA256", digests)
    monkeypatch.setattr(module, "DEBIAN_FOLDER", tmp_path / "nothing")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HOROVOD_JOBS_DATA", raising=False)
    return folder


@pytest.fixture
def server(published, monkeypatch):
    """The files behind a local address; ``requests`` lists what was asked for."""
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(published))

        def do_GET(self):
            requests.append(self.path)
            super().do_GET()

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        monkeypatch.setattr(module, "ADDRESS", f"http://127.0.0.1:{httpd.server_port}/")
        yield requests
        httpd.shutdown()
        thread.join()


def pixels(split):
    """The number that the fixture wrote into each picture."""
    inputs = split.fetch(torch.arange(len(split))).inputs[:, 0, 0, 0]
    return ((inputs * module.STD + module.MEAN) * 255).round().int().tolist()


def test_the_real_files():
    if not (module.DEBIAN_FOLDER / "train-images-idx3-ubyte.gz").is_file():
        pytest.skip("needs the Debian package dataset-fashion-mnist")
    data = fashion_mnist(str(module.DEBIAN_FOLDER))
    assert (len(data.train), len(data.validation), len(data.test)) == (55_000, 5_000, 10_000)
    assert data.input_shape == (1, 28, 28)
    inputs = data.train.fetch(torch.arange(55_000)).inputs
    assert abs(inputs.double().mean().item()) < 0.005
    assert abs(inputs.double().std().item() - 1) < 0.005
    assert torch.bincount(data.test.targets).tolist() == [1000] * 10
    assert data.test.targets[:4].tolist() == [9, 2, 1, 1]
    whole = fashion_mnist(str(module.DEBIAN_FOLDER), validation_samples=0)
    assert whole.validation is None
    everything = whole.train.fetch(torch.arange(60_000)).inputs.double()
    assert abs(everything.mean().item()) < 1e-5
    assert abs(everything.std(correction=0).item() - 1) < 1e-5


def test_validation_is_held_out_of_training_and_follows_the_seed(published):
    first = fashion_mnist(str(published), validation_samples=15)
    assert sorted(pixels(first.train) + pixels(first.validation)) == list(range(40))
    assert len(first.validation) == 15
    assert pixels(first.test) == list(range(10))
    again = fashion_mnist(str(published), validation_samples=15)
    assert (pixels(again.validation), again.digest) == (pixels(first.validation), first.digest)
    other = fashion_mnist(str(published), validation_samples=15, split_seed=1)
    assert pixels(other.validation) != pixels(first.validation)
    fewer = fashion_mnist(str(published), validation_samples=14)
    assert len({first.digest, other.digest, fewer.digest}) == 3
    with pytest.raises(ConfigError, match="validation_samples=40 does not leave any of the 40"):
        fashion_mnist(str(published), validation_samples=40)


def test_the_environment_variable_comes_before_the_cache(published, tmp_path, monkeypatch):
    cache = module.folders()[-1]
    cache.parent.mkdir(parents=True)
    cache.symlink_to(published)
    assert len(fashion_mnist(download=False, validation_samples=5).test) == 10
    own = tmp_path / "own" / "fashion-mnist"
    own.mkdir(parents=True)
    for path in published.iterdir():
        (own / path.name).write_bytes(b"")
    monkeypatch.setenv("HOROVOD_JOBS_DATA", str(own.parent))
    with pytest.raises(DataError, match=str(own)):
        fashion_mnist(download=False)


def test_nowhere_names_every_way(published):
    with pytest.raises(DataError) as caught:
        fashion_mnist(download=False)
    for way in ("apt install dataset-fashion-mnist", "HOROVOD_JOBS_DATA", "data.root", "data.download=true"):
        assert way in str(caught.value)


def test_a_root_without_the_files_is_not_passed_over(published, tmp_path):
    with pytest.raises(DataError, match=r"has no train-images-idx3-ubyte\.gz"):
        fashion_mnist(str(tmp_path))


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def damage_text(path):
    path.write_bytes(b"<html>not found</html>")


def damage_bits(path):
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[-1] ^= 1
    path.write_bytes(gzip.compress(bytes(content)))


@pytest.mark.parametrize("damage", [damage_cut, damage_text, damage_bits])
def test_a_damaged_file_is_named_with_the_remedy(published, damage):
    path = published / "t10k-labels-idx1-ubyte.gz"
    damage(path)
    with pytest.raises(DataError, match=f"{path} is damaged.*delete it"):
        fashion_mnist(str(published))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an IDX file"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01a", "starts with 0x00000d01"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x05abc", r"has 11 bytes, but its header says \[5\], which is 13 bytes"),
    ],
)
def test_content_that_is_not_idx(content, message):
    with pytest.raises(DataError, match=message):
        parse_idx(content, name="x.gz")


def test_idx_shape_and_order():
    array = torch.arange(24, dtype=torch.uint8).view(2, 3, 4)
    assert torch.equal(parse_idx(idx(array), name="x"), array)


def test_download_once_and_whole(server, published):
    data = fashion_mnist(validation_samples=5)
    assert len(data.train) == 35
    assert len(server) == 4
    cache = module.folders()[-1]
    assert sorted(path.name for path in cache.iterdir()) == sorted(module.SHA256)
    assert fashion_mnist(validation_samples=5).digest == data.digest
    assert len(server) == 4


def test_a_wrong_download_is_not_kept(server, published):
    damage_bits(published / "train-images-idx3-ubyte.gz")
    with pytest.raises(DataError, match="is damaged or another file"):
        fashion_mnist()
    assert list(module.folders()[-1].iterdir()) == []


def test_a_file_that_the_server_does_not_have(server, published):
    (published / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte.gz could not be downloaded.*apt install"):
        fashion_mnist()


def test_no_network(published, monkeypatch):
    monkeypatch.setattr(module, "ADDRESS", "http://127.0.0.1:1/")
    with pytest.raises(DataError, match=r"could not be downloaded \(.*refused.*HOROVOD_JOBS_DATA"):
        fashion_mnist()


def test_processes_of_a_host_download_once(server, published, tmp_path):
    context = multiprocessing.get_context("spawn")
    arguments = (module.SHA256,)
    options = {"address": module.ADDRESS, "folder": tmp_path / "shared"}
    workers = [context.Process(target=download_all, args=arguments, kwargs=options) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(server) == 4


def test_a_cache_that_cannot_be_made(server, published):
    Path.home().write_text("a file where the home should be")
    with pytest.raises(StorageError, match="cannot be written"):
        fashion_mnist()
