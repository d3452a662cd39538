"""The files of MovieLens-100k in the two layouts that are about: GroupLens's own, and tab-separated "atomic" files with a header."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from horovod_jobs.errors import DataError

OFFICIAL = {
    "u.data": "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490",
    "u.item": "553841ebc7de3a0fd0d6b62a204ea30c1e651aacfb2814c7a6584ac52f2c5701",
    "u.user": "f120e114da2e8cf314fd28f99417c94ae9ddf1cb6db8ce0e4b5995d40e90e62c",
}
ATOMIC = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}
GENRES = (
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
# Lower ends of the age groups that the later MovieLens data sets use.
AGES = (0, 18, 25, 35, 45, 50, 56)


@dataclass(frozen=True)
class Person:
    """A user. zip_code: as given, letters included."""

    age: int
    gender: str
    occupation: str
    zip_code: str


@dataclass(frozen=True)
class Film:
    """An item. year: None where it is not known; genres: positions in ``GENRES``, rising."""

    year: int | None
    genres: tuple[int, ...]


@dataclass(frozen=True)
class Ratings:
    """The interactions in the order of the file, each ``[N]`` int64, and what is known of users and items by their number."""

    user: Tensor
    item: Tensor
    rating: Tensor
    timestamp: Tensor
    people: Mapping[int, Person]
    films: Mapping[int, Film]

    def codes(self) -> dict[str, Tensor]:
        """Each field's values as numbers from 1 on, 0 for none: ``[N]``, or ``[N, columns]`` where there may be several."""
        occupations = {name: code for code, name in enumerate(sorted({p.occupation for p in self.people.values()}), 1)}
        width = max(len(film.genres) for film in self.films.values())
        people: dict[str, dict[int, int]] = {
            "age": {who: sum(person.age >= low for low in AGES) for who, person in self.people.items()},
            "gender": {who: "FM".index(person.gender) + 1 for who, person in self.people.items()},
            "occupation": {who: occupations[person.occupation] for who, person in self.people.items()},
            # The first digit of a zip code is a region of the United States; what begins with a letter is elsewhere.
            "region": {
                who: 1 + int(person.zip_code[0]) if person.zip_code[:1].isdigit() else 11
                for who, person in self.people.items()
            },
        }
        # Years from 1990 on, which are nine in ten films, are told apart; decades before.
        years = {
            which: 0 if film.year is None else film.year if film.year >= 1990 else film.year // 10 * 10
            for which, film in self.films.items()
        }
        genres = torch.zeros(max(self.films) + 1, width, dtype=torch.int64)
        for which, film in self.films.items():
            genres[which, : len(film.genres)] = torch.tensor(film.genres) + 1
        return {
            "user": self.user,
            "item": self.item,
            **{name: _lookup(values)[self.user] for name, values in people.items()},
            "year": _lookup(years)[self.item],
            "genres": genres[self.item],
        }


def read(contents: Mapping[str, bytes], *, folder: str) -> Ratings:
    """The interactions from the files of one layout.

    Raises:
        DataError: a line that is not what the layout says.
    """
    try:
        if "u.data" in contents:
            rows = [line.split("\t") for line in _lines(contents["u.data"], "ascii")]
            people = {int(row[0]): _person(row[1:]) for row in _split(contents["u.user"], "|", "ascii")}
            films = {int(row[0]): _official_film(row) for row in _split(contents["u.item"], "|", "latin-1")}
        else:
            rows = _split(contents["ml-100k.inter"], "\t", "ascii")[1:]
            people = {int(row[0]): _person(row[1:]) for row in _split(contents["ml-100k.user"], "\t", "ascii")[1:]}
            films = {int(row[0]): _atomic_film(row) for row in _split(contents["ml-100k.item"], "\t", "utf-8")[1:]}
        numbers = torch.tensor([[int(value) for value in row[:4]] for row in rows], dtype=torch.int64)
        user, item, rating, timestamp = numbers.unbind(1)
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise DataError(f"the MovieLens files in {folder} cannot be read ({error}); get them anew") from error
    missing = sorted(set(user.tolist()) - people.keys()) or sorted(set(item.tolist()) - films.keys())
    if missing:
        raise DataError(f"the MovieLens files in {folder} say nothing of number {missing[0]}; get them anew")
    return Ratings(user, item, rating, timestamp, people, films)


def _lines(content: bytes, encoding: str) -> list[str]:
    # Not splitlines: in latin-1 a title may hold characters that it takes for line breaks.
    return [line.removesuffix("\r") for line in content.decode(encoding).split("\n") if line]


def _split(content: bytes, separator: str, encoding: str) -> list[list[str]]:
    return [line.split(separator) for line in _lines(content, encoding)]


def _person(row: list[str]) -> Person:
    age, gender, occupation, zip_code = row
    return Person(int(age), gender, occupation, zip_code)


def _official_film(row: list[str]) -> Film:
    """Number, title with its year, dates and address, then a flag for each genre."""
    year = re.search(r"\((\d{4})\)\s*$", row[1])
    flags = row[5:]
    if len(flags) != len(GENRES):
        raise ValueError(f"film {row[0]} has {len(flags)} genre flags instead of {len(GENRES)}")
    return Film(int(year[1]) if year else None, tuple(index for index, flag in enumerate(flags) if flag == "1"))


def _atomic_film(row: list[str]) -> Film:
    """Number, title, year, genres by name with spaces between them."""
    _, _, year, genres = row
    return Film(int(year) if year.isdigit() else None, tuple(sorted(GENRES.index(name) for name in genres.split())))


def _lookup(values: Mapping[int, int]) -> Tensor:
    table = torch.zeros(max(values) + 1, dtype=torch.int64)
    table[torch.tensor(list(values))] = torch.tensor(list(values.values()))
    return table
