"""News-like articles with highlights that follow from the article by fixed rules.

Every article reports one event. Its highlights are, each on its own line:

1. who did what, where and when: adjectives dropped,
"Captain Ines Berg of the harbour police" cut to "Capt. Berg";
2. the key figure of the event; where the article corrects a figure, the corrected one;
3. the outcome, which the article tells late. After "as a result" it is joined to the figure by "and".

Background, quotes and figures of other years are left out. Difficulty 1 to 5 adds adjectives and such
distractors, moves lead and figure back, joins figure and outcome (4, 5, some of 3), corrects the figure (5).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from firstlab.data.mini_summarization import MiniSummarization
from recipe.generated import DAYS, MEN, SURNAMES, TOWNS, WOMEN, Built, GeneratedTask, Split, capitalized, with_article


@dataclass(frozen=True, slots=True)
class Event:
    """What one kind of news says. Templates use {who} the actor, {thing}, {town}, {day}, {n} the figure.

    Attributes:
        roles: (title, what follows the name) of the actor.
        things: What it is about, as a noun that takes "a" or "an".
        adjectives: May stand before a thing; never in the highlights.
        leads: Ways to report the event.
        lead: How the highlights say it.
        figures: Ways to state the key figure, as clauses.
        figure: How the highlights say it.
        outcomes: (ways to tell it, how the highlights say it), as clauses.
        low, high: Range of the figure; full hundreds where it exceeds a thousand.
        past: Other figures of other years, as clauses with {m}.
    """

    roles: tuple[tuple[str, str], ...]
    things: tuple[str, ...]
    adjectives: tuple[str, ...]
    leads: tuple[str, ...]
    lead: str
    figures: tuple[str, ...]
    figure: str
    outcomes: tuple[tuple[tuple[str, ...], str], ...]
    low: int
    high: int
    past: tuple[str, ...]


ABBREVIATIONS = {
    "Captain": "Capt.", "Professor": "Prof.", "Doctor": "Dr.", "Inspector": "Insp.", "Sergeant": "Sgt.",
    "Governor": "Gov.", "Senator": "Sen.", "Colonel": "Col.", "Mayor": "Mayor", "Judge": "Judge",
    "Director": "Dir.", "Minister": "Min.", "Coach": "Coach",
}  # fmt: skip

EVENTS = (
    Event(
        (("Captain", "of the fire brigade"), ("Inspector", "of the city police"), ("Mayor", "of the town")),
        ("warehouse", "school", "hotel", "bakery", "factory", "theatre", "farm", "library"),
        ("two-storey", "crowded", "century-old", "wooden", "well-known", "brightly painted"),
        ("a fire broke out in {thing} in {town} on {day}, {who} reported",
         "{who} said that flames swept through {thing} in {town} on {day}",
         "firefighters rushed to {thing} in {town} after it caught fire on {day}, according to {who}",
         "{thing} in {town} went up in flames on {day}, {who} confirmed"),
        "A fire hit {thing} in {town} on {day}, {who} said.",
        ("{n} people had to leave their homes", "{n} people were brought to safety",
         "families with {n} members in all were led out"),
        "{n} people were led to safety",
        ((("the road past the building will stay closed for a week",
           "drivers cannot use the nearby road for a week"),
          "the road is closed for a week"),
         (("a worker was arrested late in the evening", "police took a worker away in the evening"),
          "a worker was arrested"),
         (("the owners now plan to rebuild it", "it will be built again, its owners promise"),
          "it will be rebuilt")),
        12, 480, ("a fire in the same street hurt {m} people last year",
         "{m} people helped to put out a fire there years ago"),
    ),
    Event(
        (("Mayor", "of the town"), ("Governor", "of the province"), ("Senator", "of the northern district"),
         ("Minister", "of public works")),
        ("bridge", "hospital", "museum", "stadium", "station", "swimming pool", "school", "market hall"),
        ("long-awaited", "modern", "glass-fronted", "splendid", "much discussed", "spacious"),
        ("{who} opened {thing} in {town} on {day}",
         "{thing} in {town} was opened to the public by {who} on {day}",
         "on {day} {who} cut the ribbon of {thing} in {town}", "in {town}, {who} unveiled {thing} on {day}"),
        "{who} opened {thing} in {town} on {day}.",
        ("the work cost {n} million crowns", "taxpayers spent {n} million crowns on it",
         "the bill came to {n} million crowns"),
        "it cost {n} million crowns",
        ((("entry will be free until the summer", "nobody has to pay for entry until the summer"),
          "entry is free until summer"),
         (("a second one will follow next year", "builders will start on a second one next year"),
          "a second one follows next year"),
         (("opponents have gone to court", "those who are against it took the case to court"),
          "opponents went to court")),
        4, 95, ("an earlier plan would have cost {m} million crowns",
         "{m} million crowns went into the roads of the region last year"),
    ),
    Event(
        (("Doctor", "of the weather office"), ("Governor", "of the province"),
         ("Colonel", "of the rescue service"),
         ("Captain", "of the coast guard")),
        ("storm", "flood", "snowstorm", "landslide", "whirlwind"),
        ("violent", "sudden", "fierce", "unusual", "terrible", "late"),
        ("{thing} struck {town} on {day}, {who} announced", "{who} said {thing} had reached {town} on {day}",
         "people in {town} were surprised by {thing} on {day}, {who} told reporters",
         "{town} was hit by {thing} on {day}, according to {who}"),
        "{thing} hit {town} on {day}, {who} said.",
        ("{n} homes were damaged", "the damage reached {n} homes", "{n} homes lost their roofs or windows"),
        "{n} homes were damaged",
        ((("schools will not open before Monday", "pupils must stay at home until Monday"),
          "schools stay shut until Monday"),
         (("the army has been sent in to help", "soldiers arrived to help with the repairs"),
          "the army is helping"),
         (("all trains in the area were cancelled", "no train in the area is running"),
          "trains were cancelled")),
        15, 900, ("{m} homes were damaged in the bad winter ten years ago",
         "{m} homes in the region were built in recent years"),
    ),
    Event(
        (("Inspector", "of the city police"), ("Sergeant", "of the harbour police"),
         ("Judge", "of the local court")),
        ("painting", "necklace", "statue", "violin", "crown", "rare book", "gold watch"),
        ("priceless", "famous", "small", "carefully guarded", "royal", "beautiful"),
        ("thieves stole {thing} from a museum in {town} on {day}, {who} said",
         "{thing} vanished from a museum in {town} on {day}, {who} told the press",
         "{who} is looking for {thing} that was taken from a museum in {town} on {day}",
         "on {day} {thing} was carried out of a museum in {town}, according to {who}"),
        "{thing} was stolen in {town} on {day}, {who} said.",
        ("it is worth {n} thousand crowns", "experts put its value at {n} thousand crowns",
         "a buyer would pay {n} thousand crowns for it"),
        "it is worth {n} thousand crowns",
        ((("two men were caught at the border", "border guards stopped two men"), "two men were caught"),
         (("a reward is offered for every hint", "anyone with a hint can expect a reward"),
          "a reward is offered"),
         (("the museum will get new locks and cameras", "new locks and cameras will be fitted in the museum"),
          "the museum gets new locks")),
        20, 950, ("a coin sold for {m} thousand crowns at the same place in spring",
         "the museum earned {m} thousand crowns last year"),
    ),
    Event(
        (("Director", "of the company"), ("Minister", "of trade"), ("Mayor", "of the town")),
        ("car factory", "paper mill", "shipyard", "chocolate factory", "steel plant", "shoe factory"),
        ("struggling", "family-owned", "traditional", "once proud", "large", "busy"),
        ("{thing} in {town} will close, {who} announced on {day}",
         "{who} told workers on {day} that {thing} in {town} must shut",
         "on {day} {who} broke the news that {thing} in {town} is to shut down",
         "{who} said on {day} that the gates of {thing} in {town} would close for good"),
        "{thing} in {town} will close, {who} said on {day}.",
        ("{n} workers will lose their jobs", "{n} workers have to look for another job",
         "the plan puts {n} workers out of work"),
        "{n} jobs will be lost",
        ((("the unions have called a strike", "workers will go on strike, their unions say"),
          "unions called a strike"),
         (("a rival wants to take over the site", "the site may be bought by a rival"),
          "a rival wants the site"),
         (("the state will pay for new training", "new training will be paid for by the state"),
          "the state pays for training")),
        40, 950, ("{m} workers were hired in better days", "a sister firm employs {m} workers"),
    ),
    Event(
        (("Professor", "of the university"), ("Doctor", "of the history museum"),
         ("Director", "of the institute")),
        ("grave", "temple", "ship", "coin hoard", "stone wall", "palace", "whale skeleton"),
        ("mysterious", "well-preserved", "sunken", "forgotten", "remarkable", "huge"),
        ("{who} discovered {thing} near {town} on {day}", "{thing} was found near {town} by {who} on {day}",
         "on {day} a team led by {who} came upon {thing} near {town}",
         "digging near {town}, {who} uncovered {thing} on {day}"),
        "{who} found {thing} near {town} on {day}.",
        ("it is {n} years old", "tests show an age of {n} years", "it had been hidden for {n} years"),
        "it is {n} years old",
        ((("visitors can see it from next month", "from next month it will be on show"),
          "it goes on show next month"),
         (("building work on the site was stopped", "work on the new houses there came to a halt"),
          "building work was stopped"),
         (("it will be moved to the capital", "the capital will be its new home"),
          "it moves to the capital")),
        100, 4000, ("a similar find in the south was {m} years old",
         "the oldest house in the area is {m} years old"),
    ),
    Event(
        (("Coach", "of the home team"), ("Coach", "of the visitors"), ("Director", "of the club")),
        ("football match", "cup final", "hockey match", "basketball match", "handball match"),
        ("thrilling", "rainy", "dramatic", "sold-out", "tense", "one-sided"),
        ("the team of {who} won {thing} in {town} on {day}",
         "{who} led the team to victory in {thing} in {town} on {day}",
         "in {town}, the players of {who} came out on top in {thing} on {day}",
         "{thing} in {town} ended on {day} with a win for the team of {who}"),
        "The team of {who} won {thing} in {town} on {day}.",
        ("{n} fans watched from the stands", "{n} fans had bought tickets",
         "the stands were filled with {n} fans"),
        "{n} fans watched",
        ((("the team moves up to first place", "first place in the table now belongs to the team"),
          "the team is now first"),
         (("the captain will miss the next game", "an injury keeps the captain out of the next game"),
          "the captain misses the next game"),
         (("the losers have dismissed their trainer", "the trainer of the losers was sent home"),
          "the losers dismissed their trainer")),
        300, 9900, ("only {m} fans had come to the game before",
         "{m} fans had followed the team the year before"),
    ),
    Event(
        (("Captain", "of the coast guard"), ("Sergeant", "of the mountain rescue"),
         ("Colonel", "of the rescue service")),
        ("hiker", "fisherman", "climber", "child", "sailor", "pilot", "tourist"),
        ("lost", "exhausted", "inexperienced", "young", "injured", "frightened"),
        ("{who} rescued {thing} near {town} on {day}", "{thing} was saved near {town} by {who} on {day}",
         "on {day} helpers under {who} brought {thing} to safety near {town}",
         "a search near {town} ended on {day} when {who} found {thing} alive"),
        "{who} rescued {thing} near {town} on {day}.",
        ("the search had lasted {n} hours", "helpers had been out for {n} hours",
         "it took {n} hours to find the spot"),
        "the search took {n} hours",
        ((("doctors expect a full recovery", "there will be a full recovery, doctors believe"),
          "a full recovery is expected"),
         (("the path has been closed to visitors", "visitors may no longer use the path"),
          "the path was closed"),
         (("the village will hold a party for the helpers",
           "a party for the helpers is planned in the village"),
          "a party is planned")),
        3, 72, ("another search in the area went on for {m} hours",
         "the volunteers trained for {m} hours in winter"),
    ),
    Event(
        (("Minister", "of transport"), ("Director", "of the railway"), ("Mayor", "of the town")),
        ("bus line", "ferry", "tram line", "night train", "cycle path", "cable car"),
        ("electric", "popular", "useful", "scenic", "cheap", "little known"),
        ("{who} promised {town} {thing} on {day}", "{town} will get {thing}, {who} promised on {day}",
         "on {day} {who} presented plans for {thing} in {town}",
         "{who} said on {day} that {thing} would be built for {town}"),
        "{town} will get {thing}, {who} said on {day}.",
        ("{n} passengers are expected each day", "{n} passengers could use it daily",
         "planners hope for {n} passengers a day"),
        "{n} passengers a day are expected",
        ((("ticket prices will go up in May", "from May people will pay more for tickets"),
          "tickets cost more from May"),
         (("work begins after the harvest", "builders will arrive after the harvest"),
          "work starts after the harvest"),
         (("residents have asked for a vote", "a vote was demanded by residents"), "residents want a vote")),
        200, 9900, ("{m} passengers used the old service each day",
         "a line in the south carries {m} passengers"),
    ),
    Event(
        (("Doctor", "of the town hospital"), ("Professor", "of the medical school"),
         ("Minister", "of health")),
        ("vaccine", "heart drug", "blood test", "artificial hand", "eye operation", "sleep therapy"),
        ("promising", "painless", "affordable", "experimental", "clever", "simple"),
        ("{who} presented {thing} in {town} on {day}", "in {town}, {who} introduced {thing} on {day}",
         "{thing} was shown to experts in {town} by {who} on {day}",
         "on {day} {who} told a meeting in {town} about {thing}"),
        "{who} presented {thing} in {town} on {day}.",
        ("it helped {n} patients", "{n} patients already feel better thanks to it",
         "{n} patients were treated with success"),
        "it helped {n} patients",
        ((("a larger trial starts in autumn", "in autumn there will be a larger trial"),
          "a larger trial starts in autumn"),
         (("insurers have agreed to pay for it", "the cost will be covered by insurers"),
          "insurers will pay"),
         (("critics warn of side effects", "there may be side effects, critics warn"),
          "critics warn of side effects")),
        14, 900, ("an older method had failed with {m} patients",
         "{m} patients are on the waiting list elsewhere"),
    ),
)  # fmt: skip

BACKGROUND = (
    "the area is known for its apples and its old mills", "it had been a calm week until then",
    "life in the region changes slowly", "many visitors come to this part of the country",
    "the town council had met only a few days before", "the season had started well",
    "autumn is a busy time here",
    "the people of the region are used to hard work", "little news comes from these hills",
    "shops had just opened for the day",
    "the church tower can be seen from far away", "the local radio had played music all morning",
)  # fmt: skip
QUOTES = (
    '"We did not expect this," said {other}, who lives nearby',
    '"I will never forget this day," {other} told us',
    '"It could have been worse," said {other}, a shop owner', '"Everybody is talking about it," {other} said',
    '"We have to stay calm," {other} wrote in a letter', '{other}, a teacher, called it a day to remember',
    '{other}, who has lived there for years, shook her head', '"This is good for nobody," {other} complained',
    '"Now we can look ahead," said {other}, a baker', '{other} brought soup and blankets for everyone',
)  # fmt: skip
FILLERS = (
    "photographs of the scene were shared widely", "a small crowd had gathered by noon",
    "reporters waited outside for hours",
    "the weather stayed dry for most of the time", "details were still being checked in the evening",
    "the story was first told by a local paper", "a full report will be published later",
    "phones did not stop ringing",
    "some neighbours offered coffee and cake", "traffic was slow for a while",
    "children waved from the windows",
    "a spokesman refused to say more", "the news spread quickly",
)  # fmt: skip
RESULT = ("as a result, ", "because of this, ", "as a consequence, ")
LATER = ("in the end, ", "late in the day it became clear that ", "it was also decided that ", "")


def _build(rng: random.Random, level: int) -> Built:
    """An article of one difficulty and its highlights."""
    event = rng.choice(EVENTS)
    title, office = rng.choice(event.roles)
    given, surname = rng.choice(rng.choice((WOMEN, MEN))), rng.choice(SURNAMES)
    full = f"{title} {given} {surname}"
    if rng.random() < 0.2 * level - 0.1:
        full += f" {office}"
    noun = rng.choice(event.things)
    adjectives = rng.sample(event.adjectives, min(2, rng.randint(level // 2, (level + 1) // 2)))
    words = {"town": rng.choice(TOWNS), "day": rng.choice(DAYS)}
    step = 100 if event.high > 1000 else 1
    number, wrong, past = rng.sample(range(event.low, event.high + 1, step), 3)

    thing = f"{', '.join(adjectives)} {noun}" if adjectives else noun
    lead = rng.choice(event.leads).format(who=full, thing=with_article(thing), **words)
    figure = rng.choice(event.figures).format(n=number)
    told, outcome = rng.choice(event.outcomes)
    joined = level >= 4 or (level == 3 and rng.random() < 0.3)
    ending = rng.choice(RESULT if joined else LATER) + rng.choice(told)

    if level == 5 and rng.random() < 0.6:
        early = rng.choice(event.figures).format(n=wrong)
        figures = [f"at first it was said that {early}", f"later this was corrected: {figure}"]
    else:
        figures = [rng.choice(("", "", "officials said that ", "it was reported that ")) + figure]
    count = (1, 2, 2, 3, 3)[level - 1]
    quote = rng.choice(QUOTES).format(other=f"{rng.choice(WOMEN)} {rng.choice(SURNAMES)}")
    noise = [quote, *rng.sample(FILLERS, count)][:count]
    if level >= 3:
        noise[-1] = rng.choice(event.past).format(m=past)
    rng.shuffle(noise)

    body = [lead]
    if level >= 4 or rng.random() < 0.15 * level:
        body.insert(0, rng.choice(BACKGROUND))
    # The outcome follows the figure; from level 3 on all noise comes before it, so that it ends the article.
    facts: list[list[str]] = [figures, [ending]]
    gaps = sorted(rng.randint(0, 2 if level < 3 else 1) for _ in noise)
    for gap, text in zip(gaps, noise, strict=True):
        facts[min(gap, 1)].insert(0, text) if gap < 2 else facts[1].append(text)
    body += [text for part in facts for text in part]
    cut = rng.randint(2, len(body) - 1)
    article = "\n".join(" ".join(f"{capitalized(s)}." for s in part) for part in (body[:cut], body[cut:]))

    short = f"{ABBREVIATIONS[title]} {surname}"
    first = capitalized(event.lead.format(who=short, thing=with_article(noun), **words))
    second = capitalized(event.figure.format(n=number))
    rest = [f"{second} and {outcome}."] if joined else [f"{second}.", f"{capitalized(outcome)}."]
    return Built(article, "", ("\n".join([first, *rest]),))


class GeneratedSummarization(GeneratedTask, MiniSummarization):
    """`MiniSummarization` from its generator."""

    def build(self, rng: random.Random, level: int, split: Split) -> Built:
        """An article with its highlights."""
        return _build(rng, level)
