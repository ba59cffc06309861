"""The words that the demo model's corpus is made of."""

import random

NAMES = """
Ada Alan Alice Amir Anna Arun Ben Bella Carl Carla Cho Clara Dan Dora Elif Emil Emma Eric Eva Farah Felix Finn Fiona
Grace Greta Hana Hugo Ida Igor Ines Ivan Jack Jana Joel Jonas Julia Kai Kara Karim Lara Lena Leo Lina Liu Luca Lucy
Maja Marco Maria Max Mia Milan Mina Nadia Nico Nina Noah Nora Olga Omar Oscar Paul Petra Pia Priya Ravi Rita Robin
Rosa Ruth Sami Sara Selma Simon Sofia Stefan Tara Theo Tim Tina Tom Uma Vera Victor Wanda Yara Yuki Zoe
""".split()

CITIES = """
Athens Berlin Bern Boston Cairo Chicago Dakar Delhi Denver Dublin Geneva Hanoi Havana Helsinki Jakarta Kyoto Lagos
Leeds Lima Lisbon London Lyon Madrid Malmo Manila Miami Milan Montreal Mumbai Munich Nairobi Naples Oslo Paris Porto
Prague Quito Riga Rome Seoul Sofia Sydney Tokyo Toronto Tunis Turin Vienna Warsaw York Zurich
""".split()

ANIMALS = """
ant badger bat bear bee beetle bird camel cat cow crab crow deer dog dolphin donkey duck eagle eel elk falcon fish fox
frog goat goose hamster hare hawk hen heron horse lamb lion lizard lynx mole monkey moose moth mouse otter owl panda
parrot pigeon pony rabbit rat raven salmon seal shark sheep snail snake spider squirrel swan tiger toad trout turtle
walrus wasp whale wolf zebra
""".split()

FOODS = """
apple apricot bacon banana bean beet berry bread butter cabbage cake candy carrot cheese cherry coffee cookie corn
cream egg fig garlic ginger grape ham honey jam juice kiwi leek lemon lentil lime mango melon milk mint mushroom
noodle nut oat olive onion orange pasta peach pear pepper pie pizza plum potato pumpkin radish rice salad salt soup
spinach sugar tea toast tofu tomato turnip waffle walnut wheat yogurt
""".split()

THINGS = """
anchor arrow axe bag ball barrel basket bell bench bicycle blanket boat book boot bottle bowl box bridge broom brush
bucket button camera candle card carpet castle chain chair clock cloud coat coin comb compass cup curtain desk diamond
door drum engine fan feather fence flag flower flute fork forest garden gate glass glove guitar hammer hat helmet hill
hook house island jacket jar kettle key kite knife ladder lake lamp leaf letter lock magnet map mask mirror moon
mountain nail needle nest net ocean oven paddle paint paper pebble pen pencil piano pillow pipe plane planet plate
pocket pond pot purse puzzle radio rain ribbon ring river road robot rocket roof rope ruler sail sand saw scarf school
scissors shelf ship shirt shoe shovel sink sky soap sock spoon stamp star stone storm stove street suitcase sun table
tape tent thread ticket tool towel tower toy train tree truck tunnel umbrella valley vase violin wagon wall wallet
watch water wheel whistle wind window wire wood wool
""".split()

COLOURS = """
red blue green yellow black white brown pink purple orange grey silver golden violet
""".split()

JOBS = """
actor baker banker barber builder butcher carpenter chef clerk cook dancer dentist doctor driver editor engineer
farmer florist gardener judge lawyer librarian mechanic miner nurse painter pilot plumber poet sailor singer tailor
teacher vet waiter writer
""".split()

ADJECTIVES = """
big bright calm clean cold dark deep dry early empty fast flat fresh full heavy high hot late light long loud low
narrow new noisy old open quiet sharp short slow small soft strong sweet tall thick thin warm weak wet wide young
""".split()

VERBS_PAST = """
bought built carried cleaned closed drew found fixed followed heard held kept left lifted liked lost made moved needed
opened packed painted passed picked pulled pushed read saw sold sent showed stopped took used visited wanted washed
watched
""".split()

NOUNS = ANIMALS + FOODS + THINGS

_CONSONANTS, _VOWELS = "bcdfghjklmnprstvwz", "aeiou"


def made_up(rng: random.Random) -> str:
    """A word that no list holds: what the user writes is to be copied, not recognised."""
    syllables = (rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.randint(1, 3)))
    return "".join(syllables) + rng.choice(_CONSONANTS)


def a_name(rng: random.Random) -> str:
    return made_up(rng).capitalize() if rng.random() < 0.25 else rng.choice(NAMES)


def a_city(rng: random.Random) -> str:
    return made_up(rng).capitalize() if rng.random() < 0.15 else rng.choice(CITIES)


def any_word(rng: random.Random) -> str:
    """From any list or none, capitalised or not, or a number."""
    word = made_up(rng) if rng.random() < 0.5 else rng.choice(NOUNS + JOBS + COLOURS + NAMES + CITIES)
    return str(rng.randint(0, 9999)) if rng.random() < 0.1 else rng.choice([word, word.capitalize()])
