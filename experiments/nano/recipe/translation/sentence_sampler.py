"""Draws whole sentences: clauses, what is added to them, and how they are joined and nested."""

from __future__ import annotations

import functools
from dataclasses import replace

from recipe.translation import chinese, english, german, lexicon
from recipe.translation.lexicon import Noun, Phrase, Verb
from recipe.translation.meaning import NP, PP, Clause, Joined, Sentence
from recipe.translation.phrase_sampler import PhraseSampler, pronoun_np


@functools.cache
def _object_verbs(noun: Noun) -> list[Verb]:
    """Verbs whose object can be the head of a relative clause, in Chinese too."""
    verbs = [verb for verb in lexicon.TRANSITIVE + lexicon.PREPOSITIONAL if "{}" not in verb.zh]
    return [verb for verb in verbs if verb.en != "have" and noun in lexicon.nouns_tagged(verb.tags)]


def _ambiguous(sentence: Sentence | NP | None) -> bool:
    """Whether English leaves the tense open: "they put", "we read"."""
    if sentence is None:
        return False
    if isinstance(sentence, Joined):
        return _ambiguous(sentence.main) or _ambiguous(sentence.other)
    if isinstance(sentence, NP):
        return _ambiguous(sentence.relative)
    verb, subject = sentence.verb, sentence.subject
    if verb and subject and sentence.tense == "pres" and verb.en == verb.en_past and subject.person != "sg":
        return verb is not lexicon.COST
    return any(_ambiguous(part) for part in (subject, sentence.obj, sentence.content))


class SentenceSampler(PhraseSampler):
    """Draws sentences of a level of difficulty, 1 to 5; see `MiniTranslation` for what the levels bring."""

    def sentence(self, level: int) -> Sentence:
        """One abstract sentence of the level, 1 to 5."""
        while True:
            drawn = self.attempt(level)
            if drawn is not None and not _ambiguous(drawn):
                return drawn

    def attempt(self, level: int) -> Sentence | None:
        """A sentence of the level, or None where what was drawn does not fit together."""
        if level == 1:
            return self.predicate_clause(1) if self.chance(0.15) else self.action(1, self.tense())
        if level == 2:
            return self.described()
        if level == 3:
            return self.enriched(3)
        return self.with_one_more_clause() if level == 4 else self.with_several_clauses()

    def described(self) -> Clause | None:
        """Level 2: a clause with an adjective, a number, an owner, a price, a comparison or an occupation."""
        roll = self.rng.random()
        if roll < 0.12:
            return self.comparison()
        if roll < 0.2:
            noun = self.pick(lexicon.nouns_tagged("tvrcu"))
            subject = NP(noun, self.pick(("def", "this")), adjectives=self.adjectives(noun, 2))
            return Clause(subject, lexicon.COST, "pres", price=self.price(noun))
        if roll < 0.26:
            name = self.named()
            en, masculine, feminine, zh = self.pick(lexicon.OCCUPATIONS)
            de = masculine if name.gender == "m" else feminine
            return Clause(name, lexicon.BE, predicate=Phrase(f"{english.article(en)} {en}", de, f"是{zh}"))
        clause = self.action(2, self.tense())
        nps = [np for np in (clause.subject, clause.obj, clause.recipient) if np]
        return clause if any(np.adjectives or np.count or np.owner for np in nps) or clause.price else None

    def with_one_more_clause(self) -> Sentence | None:
        """Level 4: one relative, subordinate or that-clause."""
        kind = self.pick(("relative", "joined", "joined", "said"))
        if kind == "relative":
            return self.with_relative(4)
        if kind == "said":
            content = self.predicate_clause() if self.chance(0.4) else self.enriched(2)
            return self.said(replace(content, front=False))
        return self.joined()

    def with_several_clauses(self) -> Sentence | None:
        """Level 5: two sentences, or a relative clause and another one nested or joined."""
        kind = self.pick(("relative+", "said", "coordination", "two", "two", "said+"))
        if kind == "two":
            one = self.enriched(3) if self.chance(0.6) else self.with_relative(4)
            if one.tense not in ("pres", "past") or one.negated:
                return None
            shared = self.referred(one)
            if shared is None:
                return None
            two = self.about(*shared, one.tense)
            return None if one.predicate and two.predicate else Joined(one, ".", two)
        if kind == "coordination":
            tense = self.tense()
            one = self.action(2, tense) if self.chance(0.5) else self.with_relative(4)
            two = self.action(2, one.tense)
            return None if one.subject == two.subject else Joined(one, self.pick(("and", "but")), two)
        if kind == "relative+":
            one = self.with_relative(4)
            if self.chance(0.5):
                return Joined(one, self.pick(("because", "although")), self.weather(one.tense), True)
            shared = self.referred(one)
            if shared is None or not shared[0].human:
                return None
            link = self.pick(("because", "although"))
            if self.chance(0.5):
                return Joined(self.about(*shared, one.tense), link, one, True)
            return Joined(one, link, self.about(*shared, one.tense))
        if kind == "said+":
            said = self.said(replace(self.with_relative(4), front=False))
            return Joined(said, self.pick(("but", "and")), self.action(2, said.tense))
        return self.said(self.with_relative(4))

    def tense(self) -> str:
        """Present or, more often, past."""
        return self.pick(("pres", "past", "past"))

    def action(self, level: int, tense: str, subject: NP | None = None) -> Clause:
        """A person doing something; `level` bounds how rich the noun phrases are."""
        subject = subject or self.subject(level)
        kinds = ["transitive"] * 6 + ["prepositional", "intransitive", "intransitive", "motion"]
        if level >= 2:
            kinds += ["put", "ditransitive", "ditransitive"]
        kind = self.pick(kinds)
        clause = Clause(subject, tense=tense)
        if kind == "transitive":
            verb = self.pick(lexicon.TRANSITIVE)
            obj = self.object(verb, level, subject)
            price = None
            if level >= 2 and verb.en in ("buy", "sell") and obj.noun and self.chance(0.4):
                amount = self.price(obj.noun)
                zh = f"花{amount.zh}" if verb.en == "buy" else f"以{amount.zh}的价格"
                price = Phrase(f"for {amount.en}", f"für {amount.de}", zh)
            return replace(clause, verb=verb, obj=obj, price=price)
        if kind == "prepositional":
            verb = self.pick(lexicon.PREPOSITIONAL)
            return replace(clause, verb=verb, obj=self.object(verb, level, subject))
        if kind == "intransitive":
            return replace(clause, verb=self.pick(lexicon.INTRANSITIVE), place=self.place(level))
        if kind == "motion":
            verb = self.pick(lexicon.MOTION)
            goal = self.direction(level)
            far = goal.np.name is not None
            if far == (verb.en in ("go", "run")) or (not far and verb.en in ("fly", "travel")):
                verb = next(v for v in lexicon.MOTION if v.en == ("fly" if far else "go"))
            if verb.en == "travel" and level >= 2 and self.chance(0.6):
                clause = replace(clause, means=self.pick(lexicon.MEANS))
            return replace(clause, verb=verb, direction=goal)
        if kind == "put":
            verb = self.pick(lexicon.PUT)
            noun, surface, where = (
                self.pick(lexicon.nouns_tagged(verb.tags)),
                self.pick(lexicon.nouns_tagged("u")),
                self.pick(lexicon.POSITIONS),
            )
            obj = NP(noun, "def", self.chance(0.2), self.adjectives(noun, level))
            goal = PP(
                where.en,
                where.de,
                "acc",
                where.zh,
                NP(surface, "def", False, self.adjectives(surface, level)),
            )
            return replace(clause, verb=verb, obj=obj, direction=goal)
        verb = self.pick(lexicon.DITRANSITIVE)
        recipient = self.subject(min(level, 2))
        while recipient.pronoun or recipient.parts or recipient == subject:
            recipient = self.subject(min(level, 2))
        return replace(clause, verb=verb, obj=self.thing(verb.tags, level, subject), recipient=recipient)

    def object(self, verb: Verb, level: int, subject: NP) -> NP:
        """Whom or what the verb is done to."""
        if "p" in verb.tags and self.chance(0.5 if set(verb.tags) - set("p") else 1.0):
            while True:
                roll = self.rng.random()
                if roll < 0.15:
                    pronoun = self.pick(("he", "she", "they"))
                    if subject.pronoun in ("I", "we"):
                        return pronoun_np(pronoun)
                if roll < 0.25 and subject.pronoun not in ("I", "we"):
                    return NP(pronoun=self.pick(("I", "we")), det="")
                obj = self.subject(level)
                if not obj.pronoun and obj != subject and not (obj.noun and obj.noun is subject.noun):
                    return obj
        tags = verb.tags.replace("p", "") or verb.tags
        return self.thing(tags, level, subject)

    def predicate(self, subject: NP, tense: str, noun: Noun, negated: bool = False, state: bool = False) -> Clause:
        """Subject, "be" and an adjective fit for `noun`; `state` asks for a passing state such as "tired"."""
        adjective = self.pick(lexicon.adjectives_tagged("P")) if state else self.adjective(noun, predicate=True)
        assert adjective is not None
        colour = adjective.is_colour
        zh = f"是{adjective.zh}的" if colour else f"很{adjective.zh}"
        negative = f"不是{adjective.zh}的" if colour else f"不{adjective.zh}"
        return Clause(
            subject,
            lexicon.BE,
            tense,
            predicate=Phrase(adjective.en, adjective.de, zh),
            negated=negated,
            negated_zh=negative,
        )

    def predicate_clause(self, level: int = 2) -> Clause:
        """Somebody or something is some way."""
        while True:
            subject = self.subject(level, self.pick(("p", "rctvu", "a", "hw")))
            if subject.noun:
                subject = replace(subject, adjectives=())
                return self.predicate(subject, self.tense(), subject.noun or lexicon.NOUNS[0])

    def comparison(self) -> Clause | None:
        """One thing is more so than another."""
        tags = self.pick(("r", "c", "t", "v", "u", "p"))
        one, two = self.pick(lexicon.nouns_tagged(tags)), self.pick(lexicon.nouns_tagged(tags))
        fitting = [a for a in lexicon.ADJECTIVES if a.en_comparative and set(a.tags) & set(one.tags) & set(two.tags)]
        if one is two or not fitting:
            return None
        adjective, other = self.pick(fitting), NP(two, self.pick(("def", "this")))
        phrase = Phrase(
            f"{adjective.en_comparative} than {english.noun_phrase(other)}",
            f"{adjective.de_comparative} als {german.noun_phrase(other, 'nom')}",
            f"比{chinese.noun_phrase(other)}{adjective.zh}",
        )
        return Clause(NP(one, self.pick(("def", "this"))), lexicon.BE, self.tense(), predicate=phrase)

    def enriched(self, level: int) -> Clause:
        """A clause with a time, a negation, a modal, the perfect or the future."""
        kind = self.pick(("time", "time", "modal", "perfect", "negation", "future", "predicate"))
        if kind == "predicate":
            subject = self.subject(level, self.pick(("p", "rctvu", "hw")))
            while subject.noun is None:
                subject = self.subject(level)
            subject = replace(subject, adjectives=())
            return self.predicate(subject, self.tense(), subject.noun or lexicon.NOUNS[0], negated=True)
        if kind == "modal":
            tense = self.pick(tuple(lexicon.MODALS))
            negated = bool(lexicon.MODALS[tense].en_negated) and self.chance(0.3)
            clause = self.eventive(level, tense)
        elif kind == "perfect":
            negated = self.chance(0.4)
            clause = self.eventive(level, "perf")
            return replace(clause, negated=negated, already=not negated and self.chance(0.6))
        elif kind == "future":
            clause, negated = self.eventive(level, "fut"), self.chance(0.25)
        elif kind == "negation":
            clause, negated = self.action(level, self.tense()), True
        else:
            clause, negated = self.eventive(level, self.tense()), False
            if clause.tense == "pres" and self.chance(0.4):
                return replace(clause, frequency=self.pick(lexicon.FREQUENCIES))
            if clause.place is None and clause.direction is None and clause.price is None and self.chance(0.2):
                verb = clause.verb
                if verb and "s" not in verb.flags and not verb.preposition and "{}" not in verb.zh:
                    clause = replace(clause, manner=self.pick(lexicon.MANNERS))
            return replace(clause, time=self.time(clause.tense), front=self.chance(0.55))
        if (
            negated
            and clause.obj
            and clause.obj.det in ("some", "many", "count", "indef", "bare")
            and clause.obj.plural
        ):
            clause = replace(clause, obj=replace(clause.obj, det="def", count=None))
        clause = replace(clause, negated=negated)
        if self.chance(0.5) and not clause.stative:
            clause = replace(clause, time=self.time(clause.tense), front=self.chance(0.5))
        return clause

    def eventive(self, level: int, tense: str) -> Clause:
        """An action that can be wanted or finished: no states."""
        while True:
            clause = self.action(level, tense)
            endless = tense == "perf" and clause.verb and "n" in clause.verb.flags
            if not clause.stative and not endless:
                return clause

    def relative(self, noun: Noun) -> Clause | None:
        """A relative clause about the noun."""
        tense = self.pick(("past", "past", "pres"))
        if noun.human and self.chance(0.6):
            subject = NP(noun)
            if self.chance(0.3):
                where = self.place(2)
                verb = self.pick(
                    [v for v in lexicon.INTRANSITIVE if v.en in ("live", "work", "wait", "sit", "stand", "sing")]
                )
                return Clause(subject, verb, tense, place=where, gap="subject")
            clause = self.action(2, tense, subject)
            return replace(clause, gap="subject") if "{}" not in (clause.verb.zh if clause.verb else "") else None
        verbs = _object_verbs(noun)
        if not verbs:
            return None
        verb = self.pick(verbs)
        subject = self.subject(2)
        while subject.noun is noun:
            subject = self.subject(2)
        clause = Clause(subject, verb, tense, obj=NP(noun), gap="object")
        timed = tense == "past" and not clause.stative and self.chance(0.3)
        return replace(clause, time=self.time(tense)) if timed else clause

    def with_relative(self, level: int) -> Clause:
        """A clause one of whose noun phrases has a relative clause."""
        while True:
            clause = self.predicate_clause() if self.chance(0.3) else self.action(2, self.tense())
            slot = self.pick(("subject", "obj"))
            np = clause.subject if slot == "subject" else clause.obj
            if np is None or np.noun is None or np.noun.mass or np.owner or np.det not in ("def", "indef"):
                continue
            head = np.noun
            if slot == "subject" and np.det == "indef":
                np = replace(np, det="def")
            # Nothing may follow the relative clause, in German not even a separated prefix.
            if slot == "obj" and (clause.place or clause.direction or clause.price or clause.recipient):
                continue
            if slot == "obj" and clause.verb and clause.verb.prefix:
                continue
            relative = self.relative(head)
            if relative is None or (relative.subject and relative.subject == clause.subject and slot == "obj"):
                continue
            if relative.gap == "subject":
                relative = replace(relative, subject=NP(head, plural=np.plural))
            np = replace(np, relative=relative)
            clause = replace(clause, subject=np) if slot == "subject" else replace(clause, obj=np)
            if level >= 5 and not clause.stative and self.chance(0.3):
                clause = replace(clause, time=self.time(clause.tense), front=True)
            return clause

    def weather(self, tense: str) -> Clause:
        """A fixed clause such as "it is raining"."""
        return Clause(tense=tense, weather=tuple(self.pick(lexicon.WEATHER)))

    def referred(self, clause: Clause) -> tuple[NP, Noun | None] | None:
        """A pronoun for the subject or a thing in the object, where its gender is beyond doubt."""
        obj = clause.obj
        if obj and obj.noun and not set(obj.noun.tags) & set("pkaw") and not obj.noun.mass and self.chance(0.5):
            if clause.negated or (clause.subject and clause.subject.plural and obj.plural):
                return None
            pronoun = "they" if obj.plural else "it"
            return NP(pronoun=pronoun, det="", gender=obj.noun.gender, human=False), obj.noun
        subject = clause.subject
        if subject is None or subject.parts:
            return None
        if obj and (obj.name or obj.pronoun or (obj.noun and obj.noun.human)) or clause.recipient:
            return None
        if subject.pronoun:
            return subject, None
        if subject.name:
            return NP(pronoun="he" if subject.gender == "m" else "she", det="", gender=subject.gender), None
        noun = subject.noun
        if noun is None or noun.gender == "n" or not noun.human:
            return None
        if subject.plural:
            return NP(pronoun="they", det="", gender=noun.gender), noun
        return NP(pronoun="he" if noun.gender == "m" else "she", det="", gender=noun.gender), noun

    def about(self, pronoun: NP, noun: Noun | None, tense: str) -> Clause:
        """A clause about something mentioned before."""
        person = pronoun.human
        if not person:
            assert noun is not None
            return self.predicate(pronoun, tense, noun)
        if self.chance(0.5):
            return self.predicate(pronoun, tense, noun or lexicon.NOUNS[0], state=True)
        return self.action(2, tense, pronoun)

    def joined(self) -> Joined | None:
        """A main clause with a subordinate one."""
        tense = self.tense()
        link = self.pick(("because", "because", "although", "if", "before", "while"))
        first = link in ("if", "before", "while") or self.chance(0.5)
        if link == "if":
            tense = "pres"
        one = self.action(2, tense)
        if link in ("before", "while"):
            other = self.action(2, tense)
            shared = self.referred(one) if self.chance(0.6) else None
            if shared and shared[0].human:
                other = self.action(2, tense, shared[0])
            pair = (one, other)
        elif self.chance(0.35) or (link == "if" and self.chance(0.5)):
            pair = (self.weather(tense), one)
            if not first:
                pair = (one, pair[0])
        else:
            shared = self.referred(one)
            if shared is None:
                return None
            pair = (
                one,
                self.action(2, tense, shared[0]) if link == "if" and shared[0].human else self.about(*shared, tense),
            )
        for clause in pair:
            if clause.stative and link in ("before", "while", "if") and clause.verb is not lexicon.BE:
                return None
        if link in ("before", "while"):
            pair = (replace(pair[0], timeless=True), pair[1])
        return Joined(pair[1], link, pair[0], True) if first else Joined(pair[0], link, pair[1])

    def said(self, content: Clause) -> Clause:
        """Somebody says or thinks the content."""
        verb = self.pick(lexicon.SAY)
        subject = self.subject(2 if verb.en in ("say", "claim", "report") else 1)
        return Clause(subject, verb, self.pick(("pres", "past")), content=content)
