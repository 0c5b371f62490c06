"""Names, things and numbers that the generated English tasks talk about."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WOMEN = _words(
    "Ada Amara Anya Asha Astrid Beatriz Carmen Chiara Clara Daria Elena Elif Emma Farah Freya Grace "
    "Hana Helga Ines Ingrid Irina Jana Keiko Laila Lena Leila Lucia Maja Mara Marta Mei Mina Mira Nadia "
    "Naomi Nia Nina Olga Petra Priya Rosa Ruth Salma Sara Selma Sofia Sunita Tara Vera Yuki Zara Zofia"
)
MEN = _words(
    "Adam Ahmed Aldo Amir Anton Arjun Ben Boris Bruno Carlos Chen Dario David Diego Emil Erik Felix "
    "Finn Georg Goran Hamid Hugo Igor Ivan Jakob Jamal Jonas Juan Karim Kenji Kofi Kwame Lars Leon Luca "
    "Marco Mateo Milan Nils Noah Omar Oscar Pavel Pedro Rafael Ravi Samir Simon Tariq Tomas Victor "
    "Yusuf"
)
SURNAMES = _words(
    "Abbas Adler Bauer Berg Bianchi Brandt Castro Cohen Costa Diallo Dubois Farkas Fischer Garcia Gomez "
    "Gupta Haddad Hansen Holm Ito Ivanov Jensen Kaya Keller Khan Kim Kovac Lang Larsen Lind Lopez "
    "Mendes Mensah Meyer Moreau Mori Nagy Novak Okafor Olsen Patel Peters Popov Rossi Sato Silva Singh "
    "Sorensen Tanaka Torres Vidal Wagner Weber Wong Yilmaz Zhang"
)
TOWNS = _words(
    "Alder Ashford Bellano Bergen Brackwater Calder Castra Corvo Dalby Dorset Eastwick Elmore Fairhaven "
    "Farrow Galway Glenmoor Granby Hadley Harrow Highmoor Iverness Jarrow Kelso Kirkby Lakeport Landau "
    "Linden Lorca Marlow Millford Minden Newport Norwood Oakham Orsova Pella Porto Quarry Ravenna "
    "Redhill Rosedale Salta Selby Sandport Stonebridge Tamar Tarn Thornby Torvik Umbra Valdez Verona "
    "Vinland Waldorf Westbury Winslow Yarrow Zadar"
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
COLOURS = ("black", "blue", "brown", "green", "grey", "red", "white", "yellow")
NUMBER_WORDS = _words(
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)


def with_article(phrase: str) -> str:
    """`amber lamp` becomes `an amber lamp`, by the sound of its start."""
    vowel = phrase[0].lower() in "aeiou" and not phrase.startswith(("once", "one-", "use", "uni"))
    return f"{'an' if vowel else 'a'} {phrase}"


def sentence(text: str) -> str:
    """The text with a capital at its start; the rest is left alone."""
    return text[0].upper() + text[1:]
