"""The data sets: tiny files in the real layouts, read back; damage, absence, downloads without a network."""

import gzip
import hashlib
import io
import os
import struct
import sys
import tarfile
import urllib.error
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from swap_prune.experiments import datasets
from swap_prune.experiments.datasets import DATASETS, ImageData, calibration_data, load_dataset
from swap_prune.experiments.images import ImageTensors, iterate
from swap_prune.experiments.zoo import build_model
from tests.cases import but_long

REPOSITORY = Path(__file__).parents[2]
SHARED = Path(os.environ.get("SWAP_PRUNE_DATA", REPOSITORY.parent / "shared" / "data"))
PART_NAMES = {"train": "train", "test": "t10k"}


@pytest.fixture(autouse=True)
def isolated(monkeypatch, tmp_path):
    """No network, no data set of this machine's, and a cache of the test's own."""

    def refuse(url, timeout):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.delenv("SWAP_PRUNE_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def idx(array):
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + bytes(array.flatten().tolist())


def random_bytes(*shape, high=256, seed=0):
    return torch.randint(high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def write_mnist(root, zipped=True):
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    written = {}
    for seed, (split, part) in enumerate(PART_NAMES.items()):
        images, labels = random_bytes(5, 28, 28, seed=seed), random_bytes(5, high=10, seed=seed)
        written[split] = (images, labels)
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (folder / name).write_bytes(idx(array))
    return folder, written


def cifar_records(count, seed):
    images, labels = random_bytes(count, 3, 32, 32, seed=seed), random_bytes(count, high=10, seed=seed)
    return images, labels, bytes(torch.cat([labels[:, None], images.flatten(1)], 1).flatten().tolist())


def write_cifar(root):
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for seed, name in enumerate(DATASETS["cifar10"].train + DATASETS["cifar10"].test):
        (folder / name).write_bytes(cifar_records(2, seed)[2])
    return folder


def write_imagenet(root, listed=True):
    image_module = pytest.importorskip("PIL.Image")
    folder = root / "imagenet"
    for part, size in (("train", (224, 224)), ("val", (227, 227)), ("val", (600, 300))):
        for wnid, colour in (("n02", (255, 0, 0)), ("n01", (0, 0, 255))):
            (folder / part / wnid).mkdir(parents=True, exist_ok=True)
            image_module.new("RGB", size, colour).save(folder / part / wnid / f"{size[0]}.png")
    if listed:
        (folder / "classes.txt").write_text("n09 nothing\nn02 red things\nn01 blue things\n")
    return folder


@pytest.mark.parametrize("zipped", but_long([True, False], short=[False]))
def test_mnist_reads_back(tmp_path, zipped):
    _, written = write_mnist(tmp_path, zipped)
    data = load_dataset("mnist", tmp_path)
    assert (data.name, data.classes, len(data.train), len(data.test)) == ("mnist", 10, 5, 5)
    for split, part in (("train", data.train), ("test", data.test)):
        images, labels = written[split]
        inputs, targets = part.batch(torch.tensor([4, 0]))
        expected = (images[[4, 0]].unsqueeze(1).double() / 255 - 0.1307) / 0.3081
        torch.testing.assert_close(inputs, expected.float())
        assert targets.tolist() == labels[[4, 0]].tolist() and targets.dtype == torch.int64
        assert inputs.dtype == torch.float32


def test_cifar10_reads_back_in_the_order_of_the_batches(tmp_path):
    write_cifar(tmp_path)
    data = load_dataset("cifar10", tmp_path, mean=(0.0, 0.0, 0.0), std=(1.0, 0.5, 0.25))
    assert (len(data.train), len(data.test)) == (10, 2)
    images, labels, _ = cifar_records(2, seed=3)  # data_batch_4
    inputs, targets = data.train.batch(torch.arange(6, 8))
    expected = images.double() / 255 / torch.tensor([1.0, 0.5, 0.25]).view(3, 1, 1)
    torch.testing.assert_close(inputs, expected.float())
    assert targets.tolist() == labels.tolist()


def test_access_by_index_slice_of_loader_and_batch_agree(tmp_path):
    write_cifar(tmp_path)
    test = load_dataset("cifar10", tmp_path).test
    inputs, targets = test.batch(torch.arange(2))
    image, label = test[1]
    assert torch.equal(image, inputs[1]) and label == targets[1].item() and isinstance(label, int)
    (loaded, labels), *_ = DataLoader(test, batch_size=2)
    assert torch.equal(loaded, inputs) and torch.equal(labels, targets)
    with pytest.raises(IndexError):
        test[2]


def test_environment_names_the_folder_and_the_argument_wins(tmp_path, monkeypatch):
    write_mnist(tmp_path / "one")
    monkeypatch.setenv("SWAP_PRUNE_DATA", str(tmp_path / "one"))
    assert len(load_dataset("mnist").test) == 5
    with pytest.raises(ValueError, match="two"):
        load_dataset("mnist", tmp_path / "two")
    write_mnist(tmp_path / "home/.cache/swap-prune/data")
    monkeypatch.setenv("SWAP_PRUNE_DATA", str(tmp_path / "empty"))
    assert len(load_dataset("mnist").test) == 5


def shorten(path, count):
    path.write_bytes(path.read_bytes()[:-count])


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_idx_file_is_named(tmp_path, zipped):
    folder, _ = write_mnist(tmp_path, zipped)
    path = folder / f"t10k-images-idx3-ubyte{'.gz' if zipped else ''}"
    shorten(path, 50)
    with pytest.raises(ValueError, match=path.name):
        load_dataset("mnist", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "IDX file"),
        (b"\0\0\x08\x01", "IDX file"),
        (idx(torch.zeros(5, 1, dtype=torch.uint8)), "IDX file"),
        (idx(torch.zeros(0, dtype=torch.uint8)), "not empty"),
        (idx(torch.zeros(4, dtype=torch.uint8)), "5 labels"),
        (idx(torch.full((5,), 10, dtype=torch.uint8)), "up to 10"),
    ],
)
def test_damaged_labels_are_refused(tmp_path, content, message):
    folder, _ = write_mnist(tmp_path, zipped=False)
    (folder / "train-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=f"train-labels-idx1-ubyte must be .*{message}"):
        load_dataset("mnist", tmp_path)


@pytest.mark.parametrize("content", [b"", bytes(3072), b"\x0a" + bytes(3072)])
def test_damaged_cifar_batch_is_named(tmp_path, content):
    (write_cifar(tmp_path) / "data_batch_3.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"data_batch_3\.bin must be"):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.5,)), ((0.5,) * 3, (0.5,)), ((0.5,) * 3, (1.0, 0.0, 1.0))])
def test_bad_normalisation_is_refused(tmp_path, mean, std):
    write_cifar(tmp_path)
    with pytest.raises(ValueError, match="mean and std must"):
        load_dataset("cifar10", tmp_path, mean=mean, std=std).test[0]


def test_imagenet_classes_crops_and_resizes(tmp_path):
    write_imagenet(tmp_path)
    data = load_dataset("imagenet", tmp_path, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert (data.classes, len(data.train), len(data.test)) == (3, 2, 4)
    inputs, targets = data.test.batch(torch.arange(4))
    assert inputs.shape == (4, 3, 224, 224)
    assert targets.tolist() == [2, 2, 1, 1]
    red, blue = torch.tensor([1.0, -1.0, -1.0]), torch.tensor([-1.0, -1.0, 1.0])
    torch.testing.assert_close(inputs[:, :, 100, 100], torch.stack([blue, blue, red, red]))
    image, label = data.train[1]
    assert label == 1 and torch.equal(image[:, 0, 0], red)


def test_imagenet_takes_the_centre(tmp_path):
    folder = write_imagenet(tmp_path)
    image_module = pytest.importorskip("PIL.Image")
    image = image_module.new("L", (226, 228))
    image.putdata([column for _ in range(228) for column in range(226)])
    path = folder / "train" / "n02" / "000.png"
    image.save(path)
    pixels = load_dataset("imagenet", tmp_path, mean=(0.0,) * 3, std=(1.0,) * 3).train[1][0] * 255
    torch.testing.assert_close(pixels[0, 0], torch.arange(1.0, 225.0))


def test_imagenet_without_a_listing_sorts_the_folders(tmp_path):
    write_imagenet(tmp_path, listed=False)
    data = load_dataset("imagenet", tmp_path)
    assert data.classes == 2 and data.train.batch(torch.arange(2))[1].tolist() == [0, 1]


def test_imagenet_damage_and_strangers_are_named(tmp_path):
    folder = write_imagenet(tmp_path)
    shorten(folder / "train" / "n01" / "224.png", 100)
    with pytest.raises(ValueError, match=r"224\.png must be an RGB image"):
        load_dataset("imagenet", tmp_path).train[0]
    (folder / "train" / "n07").mkdir()
    (folder / "train" / "n07" / "a.JPEG").write_bytes(b"")
    with pytest.raises(ValueError, match=r"classes\.txt.*n07"):
        len(load_dataset("imagenet", tmp_path).train)
    (folder / "classes.txt").write_bytes(b"\xff\xfen01")
    with pytest.raises(ValueError, match=r"classes\.txt must be text in UTF-8, got byte 0xff"):
        load_dataset("imagenet", tmp_path)


def test_missing_pillow_says_what_to_install(tmp_path, monkeypatch):
    write_imagenet(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ValueError, match="pip install pillow"):
        load_dataset("imagenet", tmp_path).train[0]


def test_imagenet_is_never_downloaded(tmp_path):
    with pytest.raises(ValueError, match=r"<wnid>/\*\.JPEG.*never downloaded"):
        load_dataset("imagenet", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_offline_says_where_it_looked_and_what_it_tried(tmp_path, name):
    with pytest.raises(ValueError, match=r"by data_dir \(--data-dir\)") as caught:
        load_dataset(name, tmp_path / "here")
    message = str(caught.value)
    assert str(tmp_path / "here") in message and "https://" in message and "no network in tests" in message
    assert not (tmp_path / "here").exists()


def serve(monkeypatch, name, contents, checksums=None):
    """Let urlopen return `contents` by address, under checksums that fit unless others are given."""
    downloads = tuple((url, (checksums or {}).get(url) or hashlib.md5(body).hexdigest()) for url, body in contents)
    monkeypatch.setitem(datasets.DATASETS, name, replace(DATASETS[name], downloads=downloads))
    asked = []

    def answer(url, timeout):
        asked.append(url)
        return io.BytesIO(dict(contents)[url])

    monkeypatch.setattr("urllib.request.urlopen", answer)
    return asked


def cifar_archive(tmp_path):
    folder = write_cifar(tmp_path / "made")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(folder, folder.name)
        stranger = tarfile.TarInfo("../stranger.txt")
        archive.addfile(stranger, io.BytesIO(b""))
    return [("https://example.org/cifar-10-binary.tar.gz", buffer.getvalue())]


def files_under(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_download_of_an_archive_extracts_only_its_batches(tmp_path, monkeypatch):
    asked = serve(monkeypatch, "cifar10", cifar_archive(tmp_path))
    data = load_dataset("cifar10", tmp_path / "new")
    assert torch.equal(data.test.images, cifar_records(2, seed=5)[0])
    names = DATASETS["cifar10"].train + DATASETS["cifar10"].test
    assert files_under(tmp_path / "new") == [f"cifar-10-batches-bin/{name}" for name in names]
    load_dataset("cifar10", tmp_path / "new")
    assert len(asked) == 1


def test_download_keeps_the_files_that_are_there(tmp_path, monkeypatch):
    folder, written = write_mnist(tmp_path)
    contents = [(url, (folder / url.rpartition("/")[2]).read_bytes()) for url, _ in DATASETS["mnist"].downloads]
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    asked = serve(monkeypatch, "mnist", contents)
    data = load_dataset("mnist", tmp_path)
    assert asked == [contents[3][0]]
    assert data.test.labels.tolist() == written["test"][1].tolist()


def test_download_goes_to_the_cache_not_to_the_environments_folder(tmp_path, monkeypatch):
    serve(monkeypatch, "cifar10", cifar_archive(tmp_path))
    (tmp_path / "theirs").mkdir()
    monkeypatch.setenv("SWAP_PRUNE_DATA", str(tmp_path / "theirs"))
    assert len(load_dataset("cifar10").test) == 2
    assert files_under(tmp_path / "theirs") == []
    assert len(files_under(tmp_path / "home/.cache/swap-prune/data")) == 6


def test_wrong_checksum_leaves_nothing(tmp_path, monkeypatch):
    contents = cifar_archive(tmp_path)
    serve(monkeypatch, "cifar10", contents, {contents[0][0]: "0" * 32})
    (tmp_path / "new").mkdir()
    with pytest.raises(ValueError, match="must have MD5 00000"):
        load_dataset("cifar10", tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"mnist, cifar10, imagenet or package\.module:loader, got 'svhn'"):
        load_dataset("svhn")


LOADERS = """
import torch
from swap_prune.experiments.datasets import ImageData

batches = [(torch.zeros(2, 3), torch.zeros(2))]

def pair():
    return batches, batches

def whole():
    return ImageData("mine", 7, batches, batches)

def tensors():
    return torch.zeros(2), torch.zeros(2)

def nothing():
    return None

one_batch = batches[0]
net = torch.nn.Linear(2, 2)
"""


def test_user_loader(tmp_path, monkeypatch):
    (tmp_path / "user_loaders.py").write_text(LOADERS)
    monkeypatch.chdir(tmp_path)
    data = load_dataset("user_loaders:pair")
    assert isinstance(data, ImageData) and data.classes is None and len(list(iterate(data.test))) == 1
    assert load_dataset("user_loaders:whole").classes == 7
    for bad in ("tensors", "nothing"):
        with pytest.raises(ValueError, match=r"ImageData or a pair \(train, test\)"):
            load_dataset(f"user_loaders:{bad}")
    with pytest.raises(ValueError, match=r"data must be an importable package\.module:name"):
        load_dataset("user_loaders:absent")
    with pytest.raises(ValueError, match="returns the data, got 'user_loaders:one_batch', which is a tuple itself"):
        load_dataset("user_loaders:one_batch")
    with pytest.raises(ValueError, match="returns the model, got 'user_loaders:net', which is a Linear itself"):
        build_model("user_loaders:net")
    sys.modules.pop("user_loaders")


def tiny(count=6, height=5, width=7):
    return ImageTensors(random_bytes(count, 2, height, width), torch.arange(count), (0.25, 0.5), (0.5, 2.0))


def test_augmentation_equals_a_loop_over_images():
    images, indices = tiny(), torch.tensor([3, 3, 0, 5, 1, 2, 4, 3])
    inputs, targets = images.augmented(0).batch(indices, torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(9)
    top, left = torch.randint(9, (2, 8, 1), generator=generator)
    flips = torch.rand(8, 1, generator=generator) < 0.5
    assert 0 < flips.sum() < 8
    for n, index in enumerate(indices.tolist()):
        canvas = torch.zeros(2, 13, 15, dtype=torch.uint8)
        canvas[:, 4:9, 4:11] = images.images[index]
        crop = canvas[:, top[n] : top[n] + 5, left[n] : left[n] + 7]
        expected = images.normalise((crop.flip(-1) if flips[n] else crop)[None])[0]
        assert torch.equal(inputs[n], expected)
    assert targets.tolist() == indices.tolist()


def test_augmentation_follows_its_seeds():
    images, every = tiny(), torch.arange(6)
    state = torch.get_rng_state()
    augmented = images.augmented(1)
    first, second = augmented.batch(every)[0], augmented.batch(every)[0]
    assert not torch.equal(first, second)
    assert torch.equal(first, images.augmented(1).batch(every)[0])
    assert not torch.equal(first, images.augmented(2).batch(every)[0])
    one, again = images.augmented(1), images.augmented(1)
    assert torch.equal(one[2][0], again.batch(torch.tensor([2]))[0][0]) and one[2][1] == 2
    assert torch.equal(torch.get_rng_state(), state)


def test_pruning_augments_by_a_stream_of_its_own():
    """Recalibration draws from that of the seed itself."""
    images, every = ImageData("cifar10", 10, tiny(), tiny()), torch.arange(6)
    first, again, other = (
        data.batch(every)[0] for data in (*(calibration_data(images, 3) for _ in range(2)), images.train.augmented(3))
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_image_tensors_refuse_other_tensors():
    with pytest.raises(ValueError, match="images must be uint8"):
        ImageTensors(torch.zeros(2, 1, 4, 4), torch.zeros(2), (0.0,), (1.0,))
    with pytest.raises(ValueError, match="images must be uint8"):
        ImageTensors(random_bytes(2, 1, 4, 4), torch.zeros(3), (0.0,), (1.0,))


class Pairs(Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        return torch.full((2,), float(index)), index


@pytest.mark.parametrize("dataset", [tiny(5), Pairs()])
def test_iterate_yields_every_image_in_order(dataset):
    state = torch.get_rng_state()
    targets = [labels.tolist() for _, labels in iterate(dataset, batch_size=2)]
    assert targets == [[0, 1], [2, 3], [4]]
    chosen = [labels.tolist() for _, labels in iterate(dataset, torch.tensor([4, 1, 1]), batch_size=2)]
    assert chosen == [[4, 1], [1]]
    assert torch.equal(torch.get_rng_state(), state)


def test_iterate_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        next(iterate(tiny(), batch_size=0))
    with pytest.raises(ValueError, match="indices must be None"):
        next(iterate([(1, 2)], torch.arange(2)))


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "sizes", "shape", "classes"),
    [
        ("mnist", (60_000, 10_000), (1, 28, 28), 10),
        ("cifar10", (7_728, 846), (3, 32, 32), 10),
        ("imagenet", (1_000, 650), (3, 224, 224), 1000),
    ],
)
def test_shared_data_read(name, sizes, shape, classes):
    if not (SHARED / DATASETS[name].folder).exists():
        pytest.skip(f"no {name} in {SHARED}")
    data = load_dataset(name, SHARED)
    assert len(data.train) >= sizes[0] and len(data.test) >= sizes[1] and data.classes == classes
    inputs, targets = data.test.batch(torch.arange(8))
    assert inputs.shape == (8, *shape) and targets.min() >= 0 and targets.max() < classes
    assert inputs.std() > 0.3


def test_a_home_that_is_not_known_is_not_asked_for_without_need(tmp_path, monkeypatch):
    """As where a container runs as a user that the system does not know."""

    def unknown(path):
        if str(path).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return path

    monkeypatch.setattr(Path, "expanduser", unknown)
    write_mnist(tmp_path)
    monkeypatch.setenv("SWAP_PRUNE_DATA", str(tmp_path))
    assert len(load_dataset("mnist").train) == 5
    monkeypatch.setenv("SWAP_PRUNE_DATA", str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="home directory that is not known"):
        load_dataset("mnist")
