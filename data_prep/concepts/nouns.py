"""From captions to concepts without a vocabulary: the nouns that name something a picture can show.

Nouns().match("Two boys beside a red fire hydrant in front of a brick wall")  # ["boy", "brick", "fire hydrant", "wall"]

HanTa tags each word. The word lists below join compounds, leave out what cannot be seen and mend what the tagger gets
wrong.
"""

import functools
import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data_prep.concepts.names import SINGULAR, NameMatcher
from ovd_models.errors import InputError

TOKEN = re.compile(r"[^\W_]+|[^\w\s]")
# What separates words besides spaces. Words without end go too: HanTa's time grows with the square of their length.
SEPARATOR = re.compile(r"['’](?:s|re|t|ll|ve|d|m)\b|['’_-]|[^\W_]{30,}")
LATIN = re.compile(r"[a-zß-öø-ÿœ]{2,}")
NOUN_TAGS = frozenset({"NN0", "NN1", "NN2", "UNC", "NOUN"})
NAME_TAGS = frozenset({"NP0", "PROPN"})


def word_set(text: str) -> frozenset[str]:
    """The words of a list."""
    return frozenset(text.split())


COMPOUNDS = """
action figure, air conditioner, air freshener, air mattress, aircraft carrier, alarm clock, apple pie, apple tree, art
gallery, baby bottle, baby carriage, baking sheet, ball gown, ballet dancer, ballet shoe, balloon animal, banana bread,
banana peel, banana split, banana tree, band aid, bar stool, barbed wire, barber shop, baseball bat, baseball cap,
baseball diamond, baseball field, baseball game, baseball glove, baseball mitt, baseball stadium, basketball court,
basketball game, basketball hoop, bath mat, bath towel, bathing suit, beach ball, beach chair, beach house, beach towel,
beach umbrella, bean bag, bed frame, bed sheet, bed spread, bee hive, beer bottle, beer can, beer glass, beer mug, bell
pepper, bell tower, bike lane, bike path, bike rack, bird bath, bird cage, bird feeder, bird house, bird nest, birthday
cake, birthday candle, birthday card, birthday party, black board, blue jay, board game, boarding pass, body suit,
boiled egg, book bag, book shelf, book store, bottle cap, bottle opener, bow tie, bowling alley, bowling ball, bowling
pin, boxing glove, boxing ring, bread basket, brussels sprout, bubble bath, bubble gum, bulldog clip, bullet train,
bulletin board, bumper sticker, bunk bed, bus driver, bus lane, bus station, bus stop, bus terminal, business card,
business suit, butter dish, butter knife, butternut squash, cabinet door, cable car, can opener, canal boat, candle
holder, candle stick, candy bar, candy cane, car park, car seat, cargo ship, carrot cake, cash machine, cash register,
cat tree, catcher mitt, cattle guard, ceiling fan, ceiling light, cell phone, cell tower, cement mixer, chain link
fence, chain saw, chalk board, cheese burger, cheese cake, chef hat, cherry blossom, cherry tomato, chess board, chess
piece, chest of drawers, chew toy, chewing gum, chicken nugget, chicken wing, chili dog, chocolate bar, chocolate cake,
chocolate chip, chocolate chip cookie, chop stick, chopping board, christmas card, christmas light, christmas ornament,
christmas tree, city bus, city hall, city skyline, clock face, clock tower, clothes hanger, clothes line, coat hanger,
coat rack, cocktail glass, coconut tree, coffee bean, coffee cup, coffee machine, coffee maker, coffee mug, coffee pot,
coffee shop, coffee table, cole slaw, comic book, commuter train, compact disc, computer case, computer desk, computer
keyboard, computer monitor, computer mouse, computer screen, computer tower, concert hall, conference room, construction
site, construction worker, contact lens, convenience store, conveyor belt, cook book, cookie cutter, cookie jar, cookie
sheet, cooking pan, cooking pot, cooking utensil, corn dog, corn field, cotton candy, counter top, country road, cow
bell, cowboy boot, cowboy hat, cream cheese, credit card, cricket bat, cricket player, crock pot, cross walk, cruise
ship, cup cake, cup holder, cutting board, deck chair, desk chair, desk lamp, desktop computer, digital clock, dining
room, dining table, dinner plate, dinner table, dirt bike, dirt path, dirt road, dirt track, dish rack, dish soap, dish
towel, dish washer, display case, diving board, dog bed, dog bowl, dog collar, dog house, dog leash, dog park, door
frame, door handle, door knob, door mat, double decker bus, dough nut, dress shirt, dress shoe, dressing room, dressing
table, dried fruit, drinking fountain, drinking glass, drinking straw, drum set, drum stick, duffel bag, duffle bag,
dump truck, dust bin, ear phone, ear ring, easter egg, egg plant, egg roll, egg yolk, electric guitar, electric
toothbrush, end table, engagement ring, entertainment center, exercise bike, eye glass, eye lash, fanny pack, feather
boa, ferris wheel, ferry boat, fighter jet, fighter plane, file cabinet, filing cabinet, finger nail, fire alarm, fire
engine, fire escape, fire extinguisher, fire fighter, fire hose, fire hydrant, fire pit, fire station, fire truck, fire
wood, fire works, fish bowl, fish tank, fishing boat, fishing net, fishing pole, fishing rod, flag pole, flat bread,
flat screen television, flat screen tv, flip flop, flip phone, flower arrangement, flower bed, flower bouquet, flower
garden, flower pot, flower vase, flying disc, flying disk, folding chair, food cart, food court, food processor, food
stand, food truck, foot print, foot stool, football field, football game, football helmet, football player, french
bread, french bulldog, french fries, french toast, fried chicken, fried egg, fried rice, front door, front yard, fruit
bowl, fruit juice, fruit salad, fruit stand, fruit tree, frying pan, fur coat, game console, game controller, garage
door, garbage bag, garbage bin, garbage can, garbage truck, garden hose, gas mask, gas pump, gas station, gas stove,
gift bag, gift basket, gift box, gift card, gift shop, ginger bread, glow stick, goal post, golden retriever, golf bag,
golf ball, golf cart, golf club, golf course, gondola boat, goose neck, grand piano, grave stone, grave yard, gravel
path, gravel road, green bean, green house, green onion, grilled cheese, grizzly bear, grocery bag, grocery cart,
grocery store, guard rail, guard tower, guinea pig, guitar case, gum ball, gummy bear, hair band, hair brush, hair clip,
hair dryer, hair net, ham sandwich, hamburger bun, hand cuff, hand print, hand rail, hand towel, handle bar, hard hat,
hay bale, hay stack, head band, head board, head light, head phone, head scarf, head set, hedge hog, high chair, high
heel, high school, high speed train, highway sign, hiking boot, hiking trail, hockey game, hockey player, hockey puck,
hockey rink, hockey stick, home plate, horse back, horse carriage, horse shoe, horse trailer, hospital bed, hospital
room, hot air balloon, hot chocolate, hot dog, hot dog bun, hot dog stand, hot plate, hot sauce, hot spring, hot tub,
hotel room, house boat, house plant, humming bird, hunting dog, ice berg, ice cream, ice cream cone, ice cream sundae,
ice cream truck, ice cube, ice pack, ice rink, ice skate, ice skater, ice skating rink, icing sugar, id card, ironing
board, ivy leaf, jack hammer, jelly bean, jelly fish, jet airliner, jet engine, jet plane, jet ski, jewelry box, jig saw
puzzle, jigsaw puzzle, jump rope, jump suit, key board, key chain, key hole, kitchen appliance, kitchen cabinet, kitchen
counter, kitchen island, kitchen knife, kitchen sink, kitchen table, kitchen tool, kitchen utensil, kite board, kite
surfer, kiwi fruit, knee pad, lab coat, lady bug, lamp post, lamp shade, land scape, lap top, laptop computer, laundry
basket, laundry machine, laundry room, lawn chair, lawn mower, leather jacket, lemon tree, letter box, library book,
license plate, life buoy, life guard, life jacket, life preserver, life vest, light bulb, light fixture, light house,
light pole, light post, light saber, light switch, light tower, lighting fixture, living room, log cabin, long board,
love seat, luggage bag, luggage cart, luggage rack, lunch bag, lunch box, lunch tray, machine gun, mail box, maple leaf,
maple tree, market stall, mashed potato, measuring cup, meat ball, meat loaf, medicine bottle, medicine cabinet, metal
detector, microwave oven, milk carton, milk shake, mini fridge, mini van, mobile home, mobile phone, mop bucket,
mosquito net, motor boat, motor home, motor scooter, motor vehicle, mountain bike, mountain goat, mountain peak,
mountain range, mountain top, mouse pad, mouth wash, movie poster, movie theater, mud puddle, music box, music notes,
music stand, musical instrument, nail polish, name tag, napkin holder, neck tie, news stand, night gown, night sky,
night stand, note pad, office building, office chair, office desk, office equipment, office supplies, oil lamp, oil
painting, oil tanker, olive oil, olive tree, onion ring, orange juice, orange tree, oven mitt, over pass, pad lock,
paddle board, paddle boat, paint brush, paint can, palm tree, paper bag, paper clip, paper cup, paper plate, paper
towel, paper weight, parade float, park bench, parking garage, parking lot, parking meter, parking space, parking spot,
parking ticket, party hat, passenger car, passenger jet, passenger plane, passenger train, pasta salad, pasta sauce,
patio furniture, pay phone, pea coat, peanut butter, pedestal sink, pen nib, pencil case, pencil sharpener, pepper mill,
pepper shaker, phone booth, phone case, photo booth, piano keys, pickup truck, picnic basket, picnic blanket, picnic
table, picture frame, pie crust, pig tail, piggy bank, pillow case, pin wheel, pine cone, pine tree, ping pong ball,
ping pong table, pirate flag, pirate ship, pit bull, pita bread, pitcher mound, pizza box, pizza cutter, pizza oven,
pizza slice, place mat, plastic bag, plastic bottle, plastic wrap, play ground, play pen, playing card, plug outlet,
pocket knife, pocket watch, polar bear, police car, police dog, police man, police officer, police station, police van,
polka dot, polo shirt, pony tail, pool table, pop corn, porcelain doll, porta potty, post box, post office, pot holder,
pot hole, potato chip, potato salad, potted plant, power cord, power line, power outlet, power plant, power pole, power
strip, power tool, prairie dog, propane tank, pumpkin pie, punching bag, race car, race course, race track, radiation
sign, radio tower, rail car, rail road track, railroad car, railroad crossing, railroad station, railroad track, railway
line, railway station, railway track, rain boot, rain drop, rain forest, rear view mirror, rearview mirror, record
player, recording studio, recycling bin, recycling sign, red panda, refrigerator magnet, remote control, rice cooker,
rice field, rice paddy, road sign, rock star, rocking chair, rocking horse, roller blade, roller coaster, roller skate,
rolling pin, roof top, row boat, rubber band, rubber boot, rubber duck, rubber stamp, running shoe, running track,
runway light, rv park, safety cone, safety gear, safety helmet, safety pin, safety vest, sail boat, sailing boat, salad
bowl, salad dressing, salad plate, salt shaker, sand bag, sand box, sand castle, sand paper, santa claus, santa hat,
satellite dish, school bag, school bus, school uniform, scrap book, screen door, scrub brush, scuba diver, sea gull, sea
horse, sea lion, sea shell, sea turtle, sea weed, seat belt, security camera, security guard, semi truck, service dog,
serving dish, serving spoon, serving tray, sewing machine, shaving cream, sheep dog, shepherd dog, ship yard, shipping
container, shoe box, shoe lace, shop front, shop window, shopping bag, shopping basket, shopping cart, shopping center,
shopping mall, shot glass, shoulder bag, shower cap, shower curtain, shower head, shower stall, side mirror, side table,
side walk, sign board, sign post, silver ware, skate board, skate boarder, skate park, skateboard park, skateboard ramp,
skating rink, ski board, ski boot, ski goggles, ski hill, ski jacket, ski jump, ski lift, ski lodge, ski mask, ski pole,
ski resort, ski slope, ski suit, ski trail, sky scraper, sleeping bag, slot machine, smart phone, smoke stack, snap pea,
snow bank, snow board, snow boarder, snow boot, snow drift, snow flake, snow gear, snow man, snow mobile, snow pants,
snow plow, snow shoe, snow suit, soap bottle, soap dish, soap dispenser, soccer ball, soccer field, soccer game, soccer
goal, soccer match, soccer player, soda bottle, soda can, sofa bed, soft drink, soft toy, solar panel, soup bowl, soup
spoon, sour cream, soy sauce, space man, space shuttle, speed boat, speed limit sign, spice rack, spider web, sponge
cake, sports bra, sports car, sports equipment, spray bottle, spray can, spray paint, spring onion, spring roll, squash
racket, stained glass, stained glass window, station wagon, steak knife, steam engine, steam locomotive, steam train,
steering wheel, step ladder, step stool, stick figure, stop light, stop sign, storage container, store front, storm
cloud, storm trooper, straw berry, straw hat, street food, street lamp, street light, street market, street performer,
street sign, street signal, street vendor, stuffed animal, stuffed bear, stuffed toy, submarine sandwich, subway car,
subway station, subway train, sugar bowl, sugar cane, suit jacket, sun bather, sun flower, sun glasses, sun hat, sun
screen, sun set, sun shade, super hero, super market, surf board, surf boarder, sushi roll, suspension bridge, sweat
band, sweat pants, sweat shirt, sweet potato, swim suit, swim trunks, swim wear, swimming pool, swimming trunks, swing
set, t-shirt, table cloth, table lamp, table top, table ware, tail gate, tail light, tank top, tape dispenser, tape
measure, tape recorder, taxi cab, taxi driver, tea bag, tea cup, tea kettle, tea light, tea pot, tea set, tea towel,
teddy bear, tee shirt, telephone booth, telephone box, telephone pole, telephone wire, television camera, television
screen, television set, television stand, tennis ball, tennis court, tennis game, tennis match, tennis net, tennis
outfit, tennis player, tennis racket, tennis racquet, tennis shoe, test tube, theme park, thermos bottle, thumb tack,
tiger lily, tissue box, tissue paper, toaster oven, toilet bowl, toilet brush, toilet lid, toilet paper, toilet seat,
toilet tank, tomato sauce, tomato soup, tooth paste, tooth pick, tour boat, tour bus, tour guide, tow truck, towel rack,
tower bridge, town hall, town square, toy box, toy car, toy train, track suit, tractor trailer, traffic circle, traffic
cone, traffic cop, traffic jam, traffic light, traffic sign, traffic signal, trailer truck, train car, train engine,
train platform, train station, train track, train tunnel, train yard, trash bag, trash bin, trash can, travel bag, tree
house, tree line, tree stump, tree top, tree trunk, trench coat, trolley car, trophy cup, truck driver, tug boat, turtle
neck, tv remote, tv screen, tv set, tv stand, utility pole, utility truck, vacuum cleaner, vegetable garden, vegetable
stand, vending machine, video camera, video console, video game, video game console, video game controller, violin case,
voting booth, waffle iron, waiting room, walk in shower, walk way, walking path, walking stick, wall clock, wall socket,
warning sign, wash cloth, washing machine, waste basket, water bottle, water buffalo, water cooler, water craft, water
dispenser, water faucet, water fountain, water glass, water gun, water heater, water hydrant, water jug, water melon,
water park, water pipe, water pitcher, water ski, water skier, water slide, water tank, water tower, watering can, wave
board, weather vane, web cam, wedding cake, wedding dress, wedding gown, wedding party, wedding ring, wet suit, wheat
field, wheel barrow, whipped cream, white board, wicker basket, wicker chair, wild flower, wind chime, wind screen, wind
shield wiper, wind surfer, wind turbine, window blind, window box, window display, window frame, window pane, window
seat, window shade, window shutter, window sill, windshield wiper, wine bottle, wine cellar, wine cooler, wine glass,
wine opener, wine rack, wing tip, wood stove, wooden spoon, work table, wrapping paper, wrist band, wrist watch, yin and
yang, yin yang, yoga mat, zebra crossing, zip line, zoo keeper
"""
ROLES = word_set(
    """
    athlete boarder captain collector dancer dealer diver driver dweller employee fan farmer fighter goer guard guide
    keeper lover maker member mower officer operator owner painter performer player racer repairman rider runner seller
    shopper singer skater skier student surfer swimmer teacher trainer traveler vendor walker watcher worker
    """
)
"""The last words of persons named by what they do: "bicycle rider" is one concept."""

MASKED = """
at camera, at the camera, bed of, bike riding, blood pressure, bodies of, body of, bunch of, couple of, for camera, for
the camera, high five, horse riding, horseback riding, ice skating, into the camera, into the camera lens, king size,
kite surfing, line of, little league, middle eastern, of the camera, old school, on display, on foot, on sale, piece of,
pieces of, queen size, red sox, side by side, skate boarding, snow boarding, stainless steel, to camera, to the camera,
toward the camera, towards the camera, wake boarding, water skiing, wide angle, wind surfing
"""
"""Phrases whose nouns name nothing seen."""
NONVISUAL = word_set(
    """
    access accident account ace act address adult advantage adventure advice affair afternoon age agency aid aim air
    amount anniversary answer approach april arc area array arrival art article ascent aspect assort atmosphere attempt
    attitude august author autumn average award awe back background base basis batch beauty behavior belief bend benefit
    best bid birth bit bite black blow blue blur bottom brand break breath breeze brown budget bunch call capture care
    career case cause center centre century change chapter charge check choice christmas circle class climate clipart
    close closeup cluster cm color colour com company comparison concept concern contact content contest context
    contrast control copy copyright corner cost country course cruise culture curve custom cut cycle damage danger data
    date day de deal death debut decade december degree depth descent design detail difficulty discount display download
    dozen dream drive duty ease east economy edge editorial effect effort end energy english entry errand error escape
    eve event example exchange exhibit exposure extent fact failure fall fame fashion fear feature february fight figure
    fill film final finish fit fix flight flock floored focus foreground form format free friday front ft fun future
    gain game giant gif glimpse goal gold good grace gray green grey group growth guess habit half haul health heat
    height help herd high history hit hold holiday honor hope hour html http https hunt hurry idea image impact inch
    incident individual industry inside intent interest interior issue it item its january job journey joy jpeg jpg july
    jump june keep kg kick kickflip kilometer kind km knowledge la lack language launch law lb le lead league left
    length lesson level lie life line link list look lot lots love luck manner march mark mass match matter maximum may
    mean memory mess method mid midair middle mile mind mini miniature minimum minute miss mix mixture mm mode monday
    month mood mouthful move mr mrs multi name nap nature nd need neutral news noise non none noon north note november
    number object october offer one opposite order outdoor outdoors outside overlook pace pack pair palette part pass
    past pattern pause pdf peace period perspective phase photo photograph photography pic picture piece pile pitch
    place plan play pleasure plenty png point policy portrait pose posture power practice present pressure price pride
    problem process product profile profit program progress project purple purpose push px quarter quote race range rate
    ratio rd reach read reason recent record red region release remain report request research rest result retro return
    review ride right rise risk role roll romp round route row royalty rule rumor run sale saturday scale scenario scene
    scenery schedule score season second selfie sense september series service set setup shape share shift shot show
    side sideways sight silver sittin size skill sleep slice someone sort sound source south space special species speed
    split sport spot st stack stand start state status stir stock stop story strategy stretch stride stroke study stuff
    style subject success sum summer sunday support surface surprise swim system tabby talent talk task taste technique
    term test texture th theme theory thought thursday time tip title today tomorrow tone tonight top topic touch tour
    trace trade transport travel trend trial trick trip trouble try tuesday turn twist type unit use user value variety
    vector vibe victory view viewer visit volume wait wake walk walled war way wear weather wednesday week weekend
    weight west while white whole width wild wind winter wish wonder work world worth www year yellow yesterday youth
    zone
    """
)
ABSTRACT = re.compile(r".{2,}(?:ness|ity|tion|sion|ment|ism|ance|ence|ship|ology|hood)")
"""Endings of nouns that name nothing seen, but for `CONCRETE`."""
CONCRETE = word_set(
    """
    advertisement airship ambulance ammunition apartment appliance audience basement battleship carnation celebrity
    cement compartment condiment constellation dealership decoration embankment entrance equipment explosion garment
    harness illustration installation instrument intersection junction lotion mansion monstrance monument neighborhood
    neighbourhood ointment organism ornament parchment parliament pavement pigment plantation potion prism procession
    regiment reservation residence spaceship starship station steamship substance substation television tournament
    township university vanity vegetation wilderness witness workstation
    """
)
ING = word_set(
    """
    awning bedding building bunting carving ceiling clothing covering crossing drawing dressing duckling dumpling
    earring engraving flooring frosting furnishing icing king landing lettering lightning lining molding opening
    painting paneling piercing plumbing pudding railing rigging ring roofing scaffolding seasoning seating sibling
    siding sling spring starling sterling stocking string stuffing swing topping tubing viking wedding wing
    wiring writing yearling
    """
)
"""The nouns in -ing that name a thing; the rest name what is done."""
CERTAIN = word_set(
    """
    broccoli cat computer cow dog donut doughnut elephant frisbee giraffe kayak laptop motorbike motorcycle pasta pizza
    scooter sink skateboard ski snowboard surfboard tarp tv umbrella wetsuit zebra
    """
)
"""What the tagger takes for names, verbs or adjectives."""
INVARIANT = word_set(
    """
    abdomen atlas bagpipes binoculars bus canvas chess christmas clothes cosmos dreadlocks electronics gas glasses
    goggles goods groceries headquarters hummus iris jeans leggings lens mercedes molasses news overalls pajamas pants
    pliers pyjamas ramen regimen rhinoceros scissors series shorts species specimen stairs stamen sunglasses suspenders
    sweatpants tights trousers tweezers undies woods
    """
)
"""Words in -s that are no plurals of what they name."""
PLURALS = SINGULAR | {
    "brownies": "brownie", "buses": "bus", "busses": "bus", "calories": "calorie", "canvases": "canvas",
    "cookies": "cookie", "gases": "gas", "lenses": "lens", "axes": "axe", "mustaches": "mustache", "ties": "tie",
    "moustaches": "moustache", "pies": "pie", "selfies": "selfie", "smoothies": "smoothie", "hoodies": "hoodie",
    "movies": "movie", "zombies": "zombie", "birdies": "birdie", "veggies": "veggie", "collies": "collie",
    "mangoes": "mango", "heroes": "hero", "volcanoes": "volcano", "tornadoes": "tornado", "buffaloes": "buffalo",
    "cargoes": "cargo", "dominoes": "domino", "torpedoes": "torpedo", "echoes": "echo", "mosquitoes": "mosquito",
    "flamingoes": "flamingo", "avocadoes": "avocado", "viruses": "virus", "octopuses": "octopus", "walruses": "walrus",
    "crocuses": "crocus", "cactuses": "cactus", "campuses": "campus", "circuses": "circus", "thieves": "thief",
    "elves": "elf", "selves": "self", "fungi": "fungus", "headaches": "headache", "avalanches": "avalanche",
    "caches": "cache", "bikinis": "bikini", "kiwis": "kiwi", "martinis": "martini", "skis": "ski", "taxis": "taxi",
    "zucchinis": "zucchini",
}  # fmt: skip


@functools.cache
def phrases() -> tuple[NameMatcher, int]:
    """The compounds followed by the masked phrases, and the number of compounds."""
    compounds, masked = ([" ".join(name.split()) for name in text.split(",")] for text in (COMPOUNDS, MASKED))
    return NameMatcher.parse(compounds + masked), len(compounds)


@functools.cache
def hanta() -> Any:
    """HanTa with its English model, loaded once a process."""
    from HanTa.HanoverTagger import HanoverTagger

    tagger = HanoverTagger("morphmodel_en.pgz")
    # The morphology of words outside its lexicon takes most of the time, and captions repeat their words.
    tagger._tag_word = functools.lru_cache(maxsize=1 << 17)(tagger._tag_word)
    return tagger


@functools.cache
def spacy() -> Any:
    """The optional tagger of words.

    Raises:
        InputError: spaCy or its model is not installed.
    """
    try:
        return importlib.import_module("spacy").load("en_core_web_sm", disable=["parser", "ner", "lemmatizer"])
    except (ImportError, OSError) as error:
        raise InputError("tagger 'spacy': expected the packages spacy and en_core_web_sm, or take 'hanta'") from error


@functools.lru_cache(maxsize=1 << 17)
def known(word: str) -> str:
    """The likeliest tag of a lower-case word in HanTa's lexicon; empty if the lexicon lacks the word."""
    readings = hanta().cache.get(word, ())
    return str(hanta().int2tag[max(readings, key=lambda item: item[1])[0]]) if readings else ""


@functools.lru_cache(maxsize=1 << 17)
def singular(word: str) -> str:
    """The singular of a lower-case English noun: by lists, by its irregular last part (snowmen), by its ending."""
    if word in PLURALS:
        return PLURALS[word]
    if word in INVARIANT or len(word) < 3:
        return word
    for plural, one in SINGULAR.items():
        if word.endswith(plural) and plural not in ("dice", "mice"):  # jaundice, pumice
            return word.removesuffix(plural) + one
    if not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return word[:-2] if word.endswith(("sses", "ches", "shes", "xes", "zzes", "tzes")) else word[:-1]


def visual(noun: str) -> bool:
    """Whether a singular noun names something seen."""
    if not noun or noun in NONVISUAL or (noun.endswith("ing") and noun not in ING):
        return False
    return noun in CONCRETE or not ABSTRACT.fullmatch(noun)


def tags(words: Sequence[str], tagger: str) -> list[str]:
    """The tag of each lower-case word of a caption."""
    if tagger == "hanta":
        return list(hanta().tag_sent(words, taglevel=0))
    pipeline = spacy()
    doc = importlib.import_module("spacy.tokens").Doc(pipeline.vocab, words=list(words))
    return [token.pos_ for token in pipeline(doc)]


@dataclass(frozen=True)
class Nouns:
    """Every noun of an English caption that names something seen; a compound is one concept."""

    tagger: Literal["hanta", "spacy"] = "hanta"

    def match(self, caption: str) -> list[str]:
        """Lower-case names in the singular, in alphabetical order, each once."""
        tokens = TOKEN.findall(SEPARATOR.sub(" ", caption))
        nouns = self.nouns(tokens)
        found: set[str] = set()
        vocabulary, compounds = phrases()
        for start, stop, indices in vocabulary.spans([token.lower() for token in tokens]):
            found.update(vocabulary.names[index] for index in indices if index < compounds)
            nouns[start:stop] = [""] * (stop - start)
        place = 0
        while place < len(nouns):
            first, second = nouns[place], "".join(nouns[place + 1 : place + 2])
            if first and second and (second in ROLES or known(first + second) == "NN1"):
                found.update([f"{first} {second}"] if visual(first + second) else [])
                place += 2
            else:
                found.update([first] if visual(first) else [])
                place += 1
        return sorted(found)

    def nouns(self, tokens: Sequence[str]) -> list[str]:
        """The singular of each token that is a common noun, and an empty string for each that is none."""
        words = [token.lower() for token in tokens]
        tagged = list(zip(tokens, words, tags(words, self.tagger), strict=True))
        # A capital tells a name only in a caption that does not write every noun with one, as titles do.
        plain = any(token.islower() and tag in NOUN_TAGS for token, _, tag in tagged)
        result = []
        for place, (token, word, tag) in enumerate(tagged):
            if singular(word) in CERTAIN:
                noun = True
            elif tag in NAME_TAGS or (plain and place and token[0].isupper()):
                noun = known(word).startswith("NN") or (token.islower() and not known(word))
            else:
                noun = tag in NOUN_TAGS
            result.append(singular(word) if noun and LATIN.fullmatch(word) else "")
        return result
