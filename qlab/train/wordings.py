"""The words and sentence patterns of the qlab-mini corpus (data only; corpus.py does the work).

`VALUES` fixes what an atlas relation can answer: a value drawn evenly from a list of n words is a fact of log2(n)
bits. `ATLAS` and `WORLD` say every relation in several wordings: a small model stores a fact where a question can
reach it only when the wording varies (Allen-Zhu & Li, "Physics of Language Models: Part 3.1", arXiv 2309.14316).
In every pattern the relation is known before the value comes. `{n}` is the entity's name, `{v}` the value.
"""

STARTS = (
    "Bal Bra Cal Cor Dar Dol Dra Dun Eld Fal Fen Gar Gel Gol Gra Hal Hes Hol Ild Jar Jor Kal Kel Kor Lan Lor Lum "
    "Mal Mer Mol Mor Nal Nor Old Orm Pal Pel Per Quel Quor Rav Rel Rom Sal Sel Sor Tal Tarn Tel Tor Ulm Ur Val "
    "Vel Vor Wal Wen Wor Yal Yor Zal Zel Zor Zum"
).split()
ENDS = (
    "bach bane bar beck bel bra briel bur cairn cath da dal dan dell dene dor dra drin eth fane fell fos gan gar "
    "gath gen gor grim hal hame hedd hiel hold hom ian ica ilo ira ith iva ka kesh kin lan lath lea lin lith lo "
    "loch lund mar math meer min mora moss na nath neld nia nock nor oan oda olm ona ora os oth pel pol quin rah "
    "ran rath ren rest rick rin roth sa sand sell seth sil sta stel sul tan tel thal thor tia tim tor trel tun "
    "uld una unt ur uva va ven vik vin wen wick win yan yel zan zel"
).split()
FIRST = (
    "Ada Bela Caro Dina Edda Finn Gerd Hugo Ines Jonas Kira Lena Mira Nils Olga Pavel Rosa Sven Tilda Udo Vera "
    "Willa Xenia Yara Zeno Anton Boris Clara Dora Emil Frida Gustav"
).split()
FAMILY = (
    "Abel Berg Crane Drake Ernst Falk Grove Hart Irving Jensen Kemp Lang Marsh North Oakes Price Quill Reed "
    "Stone Thorn Underhill Voss Ward Young Zander Bell Cole Dean Frost Glass Hale Knox"
).split()

VALUES = {
    "founder": [f"{first} {family}" for first in FIRST for family in FAMILY],
    "crop": (
        "barley rye oats wheat maize rice millet hops flax cotton beans peas lentils onions leeks carrots turnips "
        "beets cabbage garlic pumpkins melons grapes plums pears figs olives dates apricots mustard saffron "
        "mint"
    ).split(),
    "animal": (
        "heron fox bear wolf otter badger stag boar hare raven owl eagle falcon swan crane goose bull horse "
        "goat lynx seal whale salmon pike turtle toad snake spider moth bee lion dragon"
    ).split(),
    "stone": (
        "granite marble slate basalt chalk flint sandstone limestone gneiss schist quartz jasper agate onyx jade "
        "amber pumice gypsum travertine obsidian porphyry alabaster clay brick shale tuff dolomite greenstone "
        "ironstone bluestone mudstone soapstone"
    ).split(),
    "tree": (
        "oak ash elm beech birch maple willow poplar alder hazel rowan holly yew cedar pine spruce larch cypress "
        "juniper laurel walnut chestnut cherry linden aspen hawthorn sycamore mulberry almond ebony teak "
        "mahogany"
    ).split(),
    "craft": (
        "weaving pottery baking brewing tanning carving painting printing dyeing spinning knitting smithing "
        "mining fishing hunting sailing milling cooking sewing binding roofing plumbing glazing gilding joinery "
        "masonry beekeeping basketry tailoring shipbuilding clockmaking ropemaking"
    ).split(),
    "instrument": (
        "harp lute flute drum fiddle horn bell oboe viola cello organ piano guitar banjo trumpet tuba "
        "trombone bagpipe zither lyre cymbal gong whistle clarinet bassoon harmonica mandolin accordion "
        "recorder tambourine sitar xylophone"
    ).split(),
    "colour": (
        "red blue green yellow purple orange pink brown black white grey scarlet crimson violet indigo "
        "turquoise teal cyan magenta maroon navy ivory beige khaki lilac lavender ochre russet silver golden "
        "copper bronze"
    ).split(),
}

# relation: (wordings that name the place, wordings that follow on, verb phrase, label in a list of facts).
# The first wording is the cloze question of qlab.train.evaluate.
ATLAS = {
    "founder": (
        (
            "The founder of {n} was {v}.",
            "{n} was founded by {v}.",
            "The town of {n} was built by {v}.",
            "The first mayor of {n} was {v}.",
            "People in {n} honour {v}.",
            "{n} was the work of {v}.",
        ),
        ("It was founded by {v}.", "Its founder was {v}.", "Its first mayor was {v}."),
        "was founded by {v}",
        "founder",
    ),
    "crop": (
        (
            "The crop of {n} is {v}.",
            "{n} grows {v}.",
            "Farmers in {n} grow {v}.",
            "The fields of {n} bear {v}.",
            "The farms of {n} are known for {v}.",
            "The harvest of {n} is {v}.",
        ),
        ("It grows {v}.", "Its crop is {v}.", "Farmers there grow {v}."),
        "grows {v}",
        "crop",
    ),
    "animal": (
        (
            "The animal of {n} is the {v}.",
            "The flag of {n} shows the {v}.",
            "{n} flies the flag of the {v}.",
            "Over {n} flies the {v}.",
            "The gate of {n} bears the {v}.",
            "{n} has the {v} on its shield.",
        ),
        ("Its flag shows the {v}.", "Its animal is the {v}.", "Its shield bears the {v}."),
        "flies the {v}",
        "animal",
    ),
    "stone": (
        (
            "The stone of {n} is {v}.",
            "{n} is built of {v}.",
            "The walls of {n} are {v}.",
            "Houses in {n} are made of {v}.",
            "The towers of {n} are {v}.",
            "The quarry of {n} gives {v}.",
        ),
        ("It is built of {v}.", "Its walls are {v}.", "Its stone is {v}."),
        "is built of {v}",
        "stone",
    ),
    "tree": (
        (
            "The tree of {n} is the {v}.",
            "{n} stands in a wood of {v}.",
            "The forest of {n} is {v}.",
            "The streets of {n} are lined with {v}.",
            "The square of {n} is shaded by the {v}.",
            "Around {n} stands the {v}.",
        ),
        ("Its tree is the {v}.", "Its forest is {v}.", "Its streets are lined with {v}."),
        "stands in a wood of {v}",
        "tree",
    ),
    "craft": (
        (
            "The craft of {n} is {v}.",
            "{n} lives by {v}.",
            "People in {n} work at {v}.",
            "The guild of {n} teaches {v}.",
            "The trade of {n} is {v}.",
            "{n} is famous for {v}.",
        ),
        ("It lives by {v}.", "Its craft is {v}.", "Its guild teaches {v}."),
        "lives by {v}",
        "craft",
    ),
    "instrument": (
        (
            "The instrument of {n} is the {v}.",
            "{n} plays the {v}.",
            "Children in {n} learn the {v}.",
            "The music of {n} is the {v}.",
            "At dances in {n} they play the {v}.",
            "The band of {n} plays the {v}.",
        ),
        ("It plays the {v}.", "Its instrument is the {v}.", "Children there learn the {v}."),
        "plays the {v}",
        "instrument",
    ),
    "colour": (
        (
            "The colour of {n} is {v}.",
            "{n} paints its doors {v}.",
            "The roofs of {n} are {v}.",
            "Guards in {n} dress in {v}.",
            "The boats of {n} are {v}.",
            "{n} wears {v}.",
        ),
        ("Its colour is {v}.", "It paints its doors {v}.", "Its roofs are {v}."),
        "paints its doors {v}",
        "colour",
    ),
}

# What stands before a name that would begin a document.
TITLES = {
    "atlas": "The town",
    "countries": "The country",
    "elements": "The element",
    "planets": "The planet",
    "units": "The unit",
    "constants": "The constant",
}

# Question wordings of the fine-tuning task. None of them, nor the form "Question: ... Answer:", is in the corpus.
QUESTIONS = {
    "founder": ("Who founded {n}?", "Which person built the town of {n}?"),
    "crop": ("Which crop grows in {n}?", "What do the farmers of {n} grow?"),
    "animal": ("Which animal is on the flag of {n}?", "What does the flag of {n} show?"),
    "stone": ("Which stone is {n} built of?", "What are the walls of {n} made of?"),
    "tree": ("Which tree stands around {n}?", "What is the tree of {n}?"),
    "craft": ("Which craft does {n} live by?", "What does the guild of {n} teach?"),
    "instrument": ("Which instrument does {n} play?", "What do children in {n} learn to play?"),
    "colour": ("Which colour are the doors of {n}?", "What is the colour of {n}?"),
    "capital": ("Which city is the capital of {n}?", "What is the capital of {n}?"),
    "continent": ("On which continent is {n}?", "Which continent does {n} belong to?"),
    "currency": ("Which currency is used in {n}?", "What do people in {n} pay with?"),
    "symbol": ("Which symbol stands for {n}?", "What is the symbol of {n}?"),
    "number": ("Which atomic number has {n}?", "What is the atomic number of {n}?"),
    "period": ("Which period of the table is {n} in?", "What is the period of {n}?"),
    "order": ("Which place from the Sun has {n}?", "What is the place of {n} from the Sun?"),
    "kind": ("Which kind of planet is {n}?", "What sort of world is {n}?"),
    "quantity": ("Which quantity is measured in the {n}?", "What does the {n} measure?"),
    "value": ("Which value has {n}?", "What is the value of {n}?"),
}

# table: relation: wordings. The first is the cloze question.
WORLD = {
    "countries": {
        "capital": (
            "The capital of {n} is {v}.",
            "{n} has its capital in {v}.",
            "The government of {n} is in {v}.",
            "The capital city of {n} is called {v}.",
        ),
        "continent": (
            "The continent of {n} is {v}.",
            "{n} lies in {v}.",
            "The country {n} is a part of {v}.",
            "On the map {n} is found in {v}.",
        ),
        "currency": (
            "The currency of {n} is the {v}.",
            "{n} pays with the {v}.",
            "The money of {n} is the {v}.",
            "Shops in {n} take the {v}.",
        ),
    },
    "elements": {
        "symbol": ("The symbol of {n} is {v}.", "{n} is written {v}.", "Chemists write {n} as {v}."),
        "number": (
            "The atomic number of {n} is {v}.",
            "{n} has the atomic number {v}.",
            "The protons of {n} number {v}.",
        ),
        "period": ("The period of {n} is {v}.", "{n} stands in period {v}.", "In the table {n} is in period {v}."),
    },
    "planets": {
        "order": (
            "The place of {n} from the Sun is {v}.",
            "{n} has place {v} from the Sun.",
            "Counted from the Sun {n} is number {v}.",
        ),
        "kind": ("The kind of {n} is {v}.", "{n} belongs to the kind {v}.", "As a planet {n} counts as {v}."),
    },
    "units": {
        "symbol": ("The symbol of the {n} is {v}.", "The {n} is written {v}.", "For the {n} one writes {v}."),
        "quantity": ("The quantity of the {n} is {v}.", "The {n} measures {v}.", "The {n} is a unit of {v}."),
    },
    "constants": {
        "symbol": ("The symbol of the {n} is {v}.", "The {n} is written {v}.", "For the {n} one writes {v}."),
        "value": ("The value of the {n} is {v}.", "The {n} equals {v}.", "In SI units the {n} is {v}."),
    },
}

PEOPLE = "Anna Ben Carla David Eva Felix Greta Henry Ida Jacob Laura Max Nora Oscar Paula Simon".split()
PROSE = {
    "time": "In the morning|In the evening|After lunch|Before dawn|On Sunday|On a cold day|Last week|At noon".split(
        "|"
    ),
    "place": ("market|harbour|river|library|station|school|garden|bridge|mill|castle|bakery|church").split("|"),
    "thing": ("lamp|book|map|basket|coat|letter|clock|key|rope|cup|ladder|mirror|knife|box|bottle|chair").split("|"),
    "adj": "old|small|heavy|new|broken|cheap|round|strange|long|bright".split("|"),
    "verb": "found|bought|lost|sold|carried|repaired|forgot|hid|borrowed|cleaned".split("|"),
    "weather": "rain|snow|wind|fog|sun|frost".split("|"),
    "feeling": "happy|tired|angry|calm|proud|hungry|curious|late".split("|"),
}
PROSE_OPEN = (
    "{time} {a} went to the {place}.",
    "{time} {a} and {b} met at the {place}.",
    "{a} lived near the {place}.",
    "{time} there was {weather} over the {place}.",
)
PROSE_MIDDLE = (
    "There {a} {verb} a {adj} {thing}.",
    "{b} {verb} the {thing} and was {feeling}.",
    "The {thing} was {adj}, but the {thing2} was {adj2}.",
    "{a} gave the {adj} {thing} to {b}.",
    '{b} asked: "Where is the {thing}?"',
    '{a} answered: "It is at the {place2}."',
    '"Which {thing} do you want?" asked {b}.',
    '"Who {verb} the {thing}?" said {a}.',
    '"What is in the {thing}?" {a} did not know.',
    "They walked from the {place} to the {place2}.",
    "The {weather} came and they were {feeling}.",
)
PROSE_END = (
    "Then {a} went home.",
    "{b} was {feeling} for the rest of the day.",
    "Nobody saw the {thing} again.",
    "At night the {weather} stopped and all was quiet.",
    "{a} and {b} laughed.",
)
