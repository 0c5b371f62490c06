"""What can be told and asked of people on their way, at home and at the market, of firms and of landmarks.

A kind of subject is a tuple of relations; an entity has one value per relation.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from recipe.generated import COLOURS, DAYS, MEN, MONTHS, NUMBER_WORDS, SURNAMES, TOWNS, WOMEN, with_article


@dataclass(frozen=True, slots=True)
class Value:
    """One value as the passage says it, other accepted spellings, and its size where it has one.

    `doing` replaces the value in verb phrases ("repairs clocks" of a clockmaker).
    """

    text: str
    others: tuple[str, ...] = ()
    size: int = 0
    doing: str = ""


@dataclass(frozen=True, slots=True)
class Relation:
    """What can be said and asked about one attribute. Templates use {s} subject, {v} value, {his}, {doing}.

    Attributes:
        draw: Makes a value.
        direct: (statement, question) pairs that share their words.
        statements: Further ways to state it.
        questions: Ways to ask for the value, in other words.
        clause: Follows "who" or "that": "lives in {v}".
        negated: The clause denied; empty where values do not repeat.
        more, less: Comparing clauses ("is older"); empty where sizes mean nothing.
        names_person: The value is a person, so that a following pronoun would be unclear.
    """

    name: str
    draw: Callable[[random.Random], Value]
    direct: tuple[tuple[str, str], ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    clause: str
    negated: str = ""
    more: str = ""
    less: str = ""
    names_person: bool = False


@dataclass(slots=True)
class Entity:
    """Someone or something a passage is about."""

    name: str
    full_name: str
    noun: str
    pronoun: str
    possessive: str
    facts: dict[str, Value] = field(default_factory=dict)
    told: list[Relation] = field(default_factory=list)
    """What the passage says of it."""


JOBS = tuple(
    Value(with_article(noun), (noun,), doing=doing)
    for noun, doing in (
        ("clockmaker", "repairs clocks"), ("baker", "bakes bread"), ("nurse", "cares for the sick"),
        ("teacher", "gives lessons to children"), ("farmer", "works in the fields"), ("tailor", "sews coats"),
        ("carpenter", "makes tables and chairs"), ("potter", "shapes clay bowls"),
        ("gardener", "looks after roses"),
        ("beekeeper", "sells honey"), ("fisher", "catches fish"), ("painter", "paints pictures"),
        ("pilot", "flies planes"), ("sailor", "works on ships"), ("lawyer", "speaks in court"),
        ("cook", "prepares meals"), ("singer", "sings on stage"), ("writer", "writes novels"),
        ("dentist", "treats teeth"), ("plumber", "mends pipes"), ("librarian", "lends out books"),
        ("shoemaker", "makes boots"), ("barber", "cuts hair"), ("judge", "decides cases"),
        ("jeweller", "sells rings"), ("mechanic", "fixes cars"), ("shepherd", "guards sheep"),
        ("astronomer", "studies the stars"), ("architect", "plans houses"),
        ("translator", "turns letters into English"),
    )
)  # fmt: skip
ANIMALS = (
    "cat",
    "dog",
    "goat",
    "horse",
    "parrot",
    "rabbit",
    "donkey",
    "goose",
    "pony",
    "mouse",
    "snake",
    "duck",
)
INSTRUMENTS = (
    "violin", "piano", "flute", "drum", "guitar", "harp", "trumpet", "organ", "cello", "horn", "banjo",
    "clarinet",
)  # fmt: skip
FOODS = (
    "plum cake", "onion soup", "fresh bread", "goat cheese", "fried fish", "apple pie", "bean stew",
    "rice pudding",
    "lemon tart", "spiced tea", "roast duck", "potato salad", "dark chocolate", "honey biscuits",
)  # fmt: skip
THINGS = (
    "lamp", "basket", "mirror", "carpet", "chair", "suitcase", "telescope", "teapot", "violin case",
    "bicycle",
    "wooden box", "coat", "map", "birdcage", "umbrella", "vase", "blanket", "clock", "chess set", "kite",
)  # fmt: skip
TRANSPORT = ("train", "bus", "ferry", "bicycle", "car", "horse", "plane", "coach", "tram", "sledge")
GOODS = (
    "glass bottles", "leather shoes", "wool blankets", "bicycles", "wooden toys", "soap", "paper",
    "copper wire",
    "garden tools", "tin boxes", "ice cream", "church bells", "fishing nets", "kitchen knives", "tea cups",
    "pianos",
    "watches", "silk scarves", "paint", "biscuits",
)  # fmt: skip
MATERIALS = ("stone", "brick", "oak", "steel", "marble", "concrete", "granite", "iron", "glass", "pine")
LANDMARKS = ("Tower", "Bridge", "Museum", "Theatre", "Library", "Station", "Hall", "Gate")
LANDMARK_NAMES = (
    "Heron", "Amber", "Falcon", "Crown", "Silver", "Lion", "Maple", "Rose", "Swan", "Garden", "River",
    "Eagle",
    "Harbour", "Orchard", "Copper", "Moon",
)  # fmt: skip
FIRMS = ("{} and Sons", "{} Works", "{} Brothers", "{} Trading", "{} Supplies", "{} Union")


def _town(rng: random.Random) -> Value:
    return Value(rng.choice(TOWNS))


def _person(rng: random.Random) -> Value:
    given, surname = rng.choice(rng.choice((WOMEN, MEN))), rng.choice(SURNAMES)
    return Value(f"{given} {surname}", (surname,))


def _firm_name(rng: random.Random) -> str:
    return rng.choice(FIRMS).format(rng.choice(SURNAMES))


def _coloured(things: tuple[str, ...]) -> Callable[[random.Random], Value]:
    def value(rng: random.Random) -> Value:
        phrase = f"{rng.choice(COLOURS)} {rng.choice(things)}"
        return Value(with_article(phrase), (phrase,))

    return value


def _one_of(phrases: tuple[str, ...], before: str = "") -> Callable[[random.Random], Value]:
    def value(rng: random.Random) -> Value:
        phrase = rng.choice(phrases)
        return Value(before + phrase, (phrase,) if before else ())

    return value


def _number(low: int, high: int, unit: str = "") -> Callable[[random.Random], Value]:
    """Sizes from low to high; some of the small ones are spelt out."""

    def value(rng: random.Random) -> Value:
        size = rng.randint(low, high)
        digits = f"{size} {unit}".strip()
        if unit and size <= 20 and rng.random() < 0.5:
            return Value(f"{NUMBER_WORDS[size - 2]} {unit}", (digits, str(size)), size)
        return Value(digits, (str(size),) if unit else (), size)

    return value


def _time(rng: random.Random) -> Value:
    hour, minute = rng.randint(5, 21), rng.choice(("00", "15", "30", "45"))
    return Value(f"{hour}:{minute}", (), hour * 60 + int(minute))


LIFE = (
    Relation(
        "job", lambda rng: rng.choice(JOBS),
        (("{s} works as {v}", "What does {s} work as?"), ("{s} has a job as {v}", "What job does {s} have?")),
        ("{s} is {v} by trade", "{s} earns {his} living as {v}", "{s} has been {v} for years",
         "{s} was trained as {v} and still is one", "{s} became {v} after school"),
        ("What does {s} do for a living?", "What is the profession of {s}?", "How does {s} earn money?"),
        "{doing}", "is not {v}",
    ),
    Relation(
        "home", _town,
        (("{s} lives in {v}", "Where does {s} live?"),
         ("{s} lives in the town of {v}", "In which town does {s} live?")),
        ("{s} has made {his} home in {v}", "{s} rents a flat in {v}", "{s} owns a small house in {v}",
         "{s} shares a house with friends in {v}", "{v} is the town that {s} calls home"),
        ("Where is the home of {s}?", "In which place does {s} live today?", "What is the home town of {s}?"),
        "lives in {v}", "does not live in {v}",
    ),
    Relation(
        "birthplace", _town,
        (("{s} was born in {v}", "Where was {s} born?"),
         ("{s} was born in the town of {v}", "In which town was {s} born?")),
        ("{s} came into the world in {v}", "{s} is a native of {v}", "{v} is the birthplace of {s}",
         "{his} parents lived in {v} when {s} was born", "{s} spent {his} first days in {v}"),
        ("What is the birthplace of {s}?", "Where did {s} come into the world?",
         "Which town is {s} a native of?"),
        "was born in {v}", "was not born in {v}",
    ),
    Relation(
        "age", _number(18, 89),
        (("{s} is {v} years old", "How old is {s}?"),
         ("{s} has reached the age of {v}", "What age has {s} reached?")),
        ("{s} turned {v} this spring", "{s} has just had {his} birthday and is now {v}", "{s} is aged {v}",
         "last month {s} celebrated turning {v}"),
        ("What is the age of {s}?", "How many years old is {s}?"),
        "is {v} years old", "", "is older", "is younger",
    ),
    Relation(
        "pet", _coloured(ANIMALS),
        (("{s} keeps {v}", "What does {s} keep?"), ("{s} has {v} as a pet", "What does {s} have as a pet?")),
        ("{s} looks after {v}", "{s} shares {his} room with {v}", "{s} never goes out without {v}",
         "{v} sleeps in the kitchen of {s}", "{s} was given {v} and still feeds it daily"),
        ("Which animal belongs to {s}?", "What kind of pet does {s} own?",
         "What animal does {s} look after?"),
        "keeps {v}", "does not keep {v}",
    ),
    Relation(
        "instrument", _one_of(INSTRUMENTS, "the "),
        (("{s} plays {v}", "What does {s} play?"), ("{s} is learning {v}", "What is {s} learning?")),
        ("{s} practises {v} every evening", "{s} took up {v} as a child",
         "in the town band {s} is heard on {v}",
         "{s} spends {his} free time with {v}"),
        ("Which instrument does {s} play?", "On which instrument does {s} make music?"),
        "plays {v}", "does not play {v}",
    ),
    Relation(
        "food", _one_of(FOODS),
        (("{s} likes {v}", "What does {s} like?"), ("{s} always orders {v}", "What does {s} always order?")),
        ("{s} would eat {v} every day", "nothing pleases {s} more than {v}", "{s} is very fond of {v}",
         "for {his} birthday {s} asked for {v}", "{s} cannot say no to {v}"),
        ("What is the favourite food of {s}?", "What does {s} enjoy eating?"),
        "likes {v}", "does not like {v}",
    ),
    Relation(
        "employer", lambda rng: Value(_firm_name(rng)),
        (("{s} works for {v}", "Who does {s} work for?"),
         ("{s} is employed by {v}", "By whom is {s} employed?")),
        ("{s} has a post at {v}", "{s} draws {his} wages from {v}", "{v} took {s} on some years ago",
         "{s} signed a contract with {v}"),
        ("Which firm pays {s}?", "What is the employer of {s} called?",
         "At which company does {s} have a job?"),
        "works for {v}", "does not work for {v}",
    ),
    Relation(
        "teacher", _person,
        (("{s} was taught by {v}", "Who was {s} taught by?"),
         ("{s} learned everything from {v}", "From whom did {s} learn everything?")),
        ("{s} took lessons from {v}", "{v} was the teacher of {s}", "{s} owes {his} skill to {v}",
         "{s} was a pupil of {v}"),
        ("Who gave lessons to {s}?", "Whose pupil was {s}?", "Who was the teacher of {s}?"),
        "was taught by {v}", "", names_person=True,
    ),
)  # fmt: skip

JOURNEY = (
    Relation(
        "destination", _town,
        (("{s} travelled to {v}", "Where did {s} travel to?"), ("{s} went to {v}", "Where did {s} go?")),
        ("{s} set off for {v}", "the road took {s} to {v}", "{s} had a ticket to {v}", "{s} visited {v}",
         "{v} was where {s} wanted to be"),
        ("What was the destination of {s}?", "Which town did {s} visit?",
         "To which town did {s} make a journey?"),
        "went to {v}", "did not go to {v}",
    ),
    Relation(
        "transport", _one_of(TRANSPORT, "by "),
        (("{s} travelled {v}", "How did {s} travel?"), ("{s} came {v}", "How did {s} come?")),
        ("{s} made the whole trip {v}", "{s} chose to go {v}", "as always, {s} crossed the country {v}",
         "because of the weather {s} arrived {v}"),
        ("What means of transport did {s} use?", "In what way did {s} get there?"),
        "travelled {v}", "did not travel {v}",
    ),
    Relation(
        "day", _one_of(DAYS, "on "),
        (("{s} left {v}", "When did {s} leave?"), ("{s} left home {v}", "When did {s} leave home?")),
        ("{s} set out {v}", "{s} said goodbye {v}", "{v} the journey of {s} began",
         "{s} locked {his} door {v} and was gone"),
        ("On which day did {s} set out?", "On what day of the week did {s} start the journey?"),
        "left {v}", "did not leave {v}",
    ),
    Relation(
        "hour", _time,
        (("{s} arrived at {v}", "When did {s} arrive?"),
         ("{s} arrived there at {v}", "At what time did {s} arrive?")),
        ("{s} reached the station at {v}", "at {v} {s} was met at the gate", "it was {v} when {s} got there"),
        ("At what hour did {s} get there?", "What time was it when {s} came in?"),
        "arrived at {v}", "", "arrived later", "arrived earlier",
    ),
    Relation(
        "fare", _number(5, 60, "coins"),
        (("{s} paid {v} for the trip", "How much did {s} pay for the trip?"),
         ("{s} paid a fare of {v}", "What fare did {s} pay?")),
        ("the ticket cost {s} {v}", "{s} gave the driver {v}", "{s} spent {v} on {his} ticket",
         "{s} handed over {v} for a seat"),
        ("How much did the journey cost {s}?", "What was the price of the ticket that {s} bought?"),
        "paid {v}", "", "paid more", "paid less",
    ),
    Relation(
        "luggage", _coloured(THINGS),
        (("{s} carried {v}", "What did {s} carry?"), ("{s} took along {v}", "What did {s} take along?")),
        ("{s} had {v} with {his} luggage", "{s} held {v} all the way", "next to {s} on the seat was {v}",
         "{s} would not leave without {v}"),
        ("What did {s} have in the luggage?", "Which object did {s} bring on the journey?"),
        "carried {v}", "did not carry {v}",
    ),
)  # fmt: skip

MARKET = (
    Relation(
        "item", _coloured(THINGS),
        (("{s} bought {v}", "What did {s} buy?"), ("{s} chose {v}", "What did {s} choose?")),
        ("{s} walked home with {v}", "{s} could not resist {v}", "{s} found {v} among the stalls",
         "{v} caught the eye of {s}, who took it home"),
        ("Which object did {s} purchase?", "What did {s} get at the market?"),
        "bought {v}", "did not buy {v}",
    ),
    Relation(
        "price", _number(5, 95, "coins"),
        (("{s} paid {v}", "How much did {s} pay?"), ("{s} spent {v}", "How much did {s} spend?")),
        ("it cost {s} {v}", "{s} counted out {v}", "{s} handed {v} to the seller",
         "{s} left {v} on the table"),
        ("What price did {s} pay?", "How much money did {s} hand over?", "What was the cost for {s}?"),
        "paid {v}", "", "paid more", "paid less",
    ),
    Relation(
        "seller", _person,
        (("{s} bought from {v}", "Who did {s} buy from?"), ("{s} dealt with {v}", "Who did {s} deal with?")),
        ("{v} served {s}", "{s} went to the stall of {v}", "{s} made a bargain with {v}"),
        ("Who served {s}?", "Whose stall did {s} visit?", "Who sold something to {s}?"),
        "bought from {v}", "", names_person=True,
    ),
    Relation(
        "month", _one_of(MONTHS, "in "),
        (("{s} came to the market {v}", "When did {s} come to the market?"),),
        ("{s} went shopping {v}", "{v} {s} looked around the stalls", "{s} visited the market {v}"),
        ("In which month did {s} go shopping?", "In what month was {s} at the market?"),
        "came {v}", "did not come {v}",
    ),
)  # fmt: skip

FIRM = (
    Relation(
        "product", _one_of(GOODS),
        (("{s} makes {v}", "What does {s} make?"), ("{s} sells {v}", "What does {s} sell?")),
        ("{s} is known for {v}", "{s} has always lived on {v}", "from the halls of {s} come {v}",
         "{s} sends {v} all over the country"),
        ("What is the product of {s}?", "What does {s} produce?", "Which goods come from {s}?"),
        "makes {v}", "does not make {v}",
    ),
    Relation(
        "seat", _town,
        (("{s} is based in {v}", "Where is {s} based?"),
         ("{s} has its office in {v}", "Where does {s} have its office?")),
        ("{s} has its seat in {v}", "{s} works from an old hall in {v}", "the workshops of {s} stand in {v}",
         "{s} never moved away from {v}"),
        ("In which town is the seat of {s}?", "Which town is the home of {s}?", "Where can {s} be found?"),
        "is based in {v}", "is not based in {v}",
    ),
    Relation(
        "founder", _person,
        (("{s} was founded by {v}", "Who was {s} founded by?"),
         ("{s} was founded by {v}", "Who founded {s}?")),
        ("{v} started {s} with borrowed money", "{s} was set up by {v}", "{s} goes back to {v}",
         "{s} was the idea of {v}"),
        ("Who started {s}?", "Who set up {s}?", "Who had the idea for {s}?"),
        "was founded by {v}", "", names_person=True,
    ),
    Relation(
        "founded", _number(1820, 2015),
        (("{s} was founded in {v}", "When was {s} founded?"), ("{s} opened in {v}", "When did {s} open?")),
        ("{s} has existed since {v}", "{s} began its work in {v}", "{s} took its first order in {v}"),
        ("In what year did {s} begin?", "Since what year has {s} existed?"),
        "was founded in {v}", "", "was founded later", "was founded earlier",
    ),
    Relation(
        "staff", _number(8, 950, "workers"),
        (("{s} has {v}", "How many workers does {s} have?"),
         ("{s} employs {v}", "How many workers does {s} employ?")),
        ("{s} gives work to {v}", "{s} pays {v} every month", "at the gates of {s} you meet {v} each day"),
        ("How many people work at {s}?", "How large is the staff of {s}?"),
        "employs {v}", "", "has more workers", "has fewer workers",
    ),
    Relation(
        "owner", _person,
        (("{s} belongs to {v}", "Who does {s} belong to?"), ("{s} is led by {v}", "Who is {s} led by?")),
        ("{v} runs {s} today", "{s} was taken over by {v}", "{s} is now in the hands of {v}"),
        ("Who is the head of {s}?", "Who is in charge of {s}?", "Who is responsible for {s} now?"),
        "belongs to {v}", "", names_person=True,
    ),
)  # fmt: skip

LANDMARK = (
    Relation(
        "place", _town,
        (("{s} stands in {v}", "Where does {s} stand?"),
         ("{s} can be seen in {v}", "Where can {s} be seen?")),
        ("{s} is the pride of {v}", "{s} draws visitors to {v}", "people in {v} walk past {s} daily",
         "{s} was put up in {v}"),
        ("In which town is {s}?", "Which town is the site of {s}?", "What is the location of {s}?"),
        "stands in {v}", "does not stand in {v}",
    ),
    Relation(
        "built", _number(1450, 1990),
        (("{s} was built in {v}", "When was {s} built?"),
         ("{s} was finished in {v}", "When was {s} finished?")),
        ("{s} dates from {v}", "{s} was completed in {v}", "{s} has welcomed guests since {v}"),
        ("In what year was {s} completed?", "What year does {s} date from?"),
        "was built in {v}", "", "was built later", "was built earlier",
    ),
    Relation(
        "material", _one_of(MATERIALS),
        (("{s} is made of {v}", "What is {s} made of?"),
         ("{s} was built from {v}", "What was {s} built from?")),
        ("the walls of {s} are {v}", "{s} consists mostly of {v}", "for {s} the builders used {v}"),
        ("What material was used for {s}?", "Which material does {s} consist of?"),
        "is made of {v}", "is not made of {v}",
    ),
    Relation(
        "height", _number(6, 120, "metres"),
        (("{s} is {v} high", "How high is {s}?"), ("{s} has a height of {v}", "What height does {s} have?")),
        ("{s} rises {v} above the street", "{s} measures {v} from top to bottom", "{s} reaches up {v}"),
        ("How tall is {s}?", "What is the height of {s}?"),
        "is {v} high", "", "is taller", "is lower",
    ),
    Relation(
        "architect", _person,
        (("{s} was designed by {v}", "Who was {s} designed by?"),
         ("{s} was designed by {v}", "Who designed {s}?")),
        ("{v} drew the plans for {s}", "{s} is the work of {v}", "{s} made {v} famous"),
        ("Who was the architect of {s}?", "Who made the plans for {s}?"),
        "was designed by {v}", "", names_person=True,
    ),
    Relation(
        "ticket", _number(2, 40, "coins"),
        (("a visit to {s} costs {v}", "How much does a visit to {s} cost?"),),
        ("visitors of {s} pay {v}", "{s} asks {v} from every guest", "{s} lets people in for {v}"),
        ("What do visitors pay at {s}?", "What is the entrance fee of {s}?"),
        "costs {v}", "", "costs more", "costs less",
    ),
)  # fmt: skip

KINDS = (LIFE, LIFE, JOURNEY, MARKET, FIRM, LANDMARK)  # life twice: it has the most to tell


def say(template: str, entity: Entity, relation: Relation, subject: str) -> str:
    """The template with the entity's value of the relation, and `subject` for its subject."""
    value = entity.facts[relation.name]
    return template.format(s=subject, v=value.text, his=entity.possessive, doing=value.doing)


def draw_entities(rng: random.Random, kind: tuple[Relation, ...], count: int, mixed: bool = False) -> list[Entity]:
    """Entities without facts, no two of which share a name; `mixed` alternates women and men."""
    if kind is FIRM:
        names = [rng.choice(FIRMS).format(surname) for surname in rng.sample(SURNAMES, count)]
        return [Entity(name, name, "firm", "it", "its") for name in names]
    if kind is LANDMARK:
        names = [f"the {name} {rng.choice(LANDMARKS)}" for name in rng.sample(LANDMARK_NAMES, count)]
        return [Entity(name, name, "landmark", "it", "its") for name in names]
    women, men = rng.sample(WOMEN, count), rng.sample(MEN, count)
    surnames = rng.sample(SURNAMES, count)
    first = rng.randrange(2)
    people = []
    for i in range(count):
        woman = (i + first) % 2 == 0 if mixed else rng.random() < 0.5
        given = women[i] if woman else men[i]
        words = ("woman", "she", "her") if woman else ("man", "he", "his")
        people.append(Entity(given, f"{given} {surnames[i]}", *words))
    return people


def settle(rng: random.Random, entities: list[Entity], relation: Relation) -> None:
    """Gives every entity its own value of a relation; sizes differ too."""
    used: set[str] = {entity.name for entity in entities}
    sizes: set[int] = set()
    for entity in entities:
        while True:
            value = relation.draw(rng)
            # A person or firm among the values must not look like one the passage is about.
            words = set(value.text.split()) if relation.names_person else {value.text}
            if words & used or (value.size and value.size in sizes):
                continue
            entity.facts[relation.name] = value
            used |= words
            sizes.add(value.size)
            break
