"""Intents of short requests, a classification task for encoders: 16 classes in groups that share their words.

"wake me at seven", "cancel the alarm for seven" and "when is my alarm for seven" differ in what is asked, not in what is talked
about, so that a bag of topics is not enough. Sentences are drawn from wordings with slots. Training and test sentences use
other WORDINGS, not only other slots: the test asks for the meaning, not for the form.
"""

import random
from dataclasses import dataclass

SLOTS = {
    "time": (
        "six", "half past six", "seven", "a quarter to eight", "noon", "5 pm", "9:30", "ten tonight", "midnight", "eleven",
    ),
    "span": ("two minutes", "ten minutes", "half an hour", "90 seconds", "an hour", "a quarter of an hour", "45 minutes"),
    "day": ("today", "tomorrow", "on Monday", "on Friday", "this weekend", "next Tuesday", "on the third"),
    "room": ("kitchen", "bedroom", "hall", "office", "garage", "bathroom", "living room", "attic"),
    "person": ("Anna", "my brother", "Doctor Hill", "mum", "Jacob", "the plumber", "Nora", "grandpa"),
    "item": ("milk", "batteries", "two lemons", "bread", "soap", "rice", "stamps", "coffee", "light bulbs"),
    "music": ("jazz", "the radio", "my morning songs", "some Bach", "the new album", "something quiet", "rock"),
    "event": ("the dentist", "a lunch with Nora", "choir practice", "the board meeting", "the school play", "a haircut"),
    "amount": ("two degrees", "a little", "three degrees", "a bit", "half a degree"),
    "note": ("I am late", "the train is full", "dinner is ready", "happy birthday", "I found the keys"),
}  # fmt: skip

BEFORE = ("", "hey, ", "one more thing: ", "okay, ", "listen, ", "before I forget, ")
AFTER = ("", ", thanks", ", if you can", ", that is all", ", quickly")

# intent → wordings for training, wordings for the test
WORDINGS = {
    "alarm_set": (
        ("wake me at {time}", "set an alarm for {time}", "I have to get up at {time} {day}", "alarm at {time} please",
         "make sure I am awake by {time}", "new alarm, {time}", "ring at {time} {day}"),
        ("get me out of bed at {time}", "I need an alarm, {time} {day}", "could you wake me {day} at {time}"),
    ),
    "alarm_cancel": (
        ("cancel the alarm for {time}", "delete my {time} alarm", "I can sleep in {day}, no alarm", "turn off the alarm at {time}",
         "do not wake me at {time}", "forget the alarm I set for {time}", "remove all alarms {day}"),
        ("scrap the {time} alarm", "I no longer need to be woken at {time}", "no alarm {day} after all"),
    ),
    "alarm_query": (
        ("when is my alarm", "is an alarm set for {time}", "what time will you wake me {day}", "which alarms are on",
         "did I set an alarm for {time}", "tell me my alarms {day}", "do I have an alarm at {time}"),
        ("at what time does the alarm ring {day}", "have I got anything waking me at {time}", "list the alarms for {day}"),
    ),
    "timer_set": (
        ("set a timer for {span}", "count down {span}", "start {span} on the timer", "remind me in {span}",
         "{span} timer please", "time {span} for the eggs", "tell me when {span} have passed"),
        ("give me {span} on the clock", "I need a countdown of {span}", "let me know after {span}"),
    ),
    "timer_query": (
        ("how long is left on the timer", "how much of the {span} remains", "is the timer still running", "check the timer",
         "how many minutes until the timer ends", "are the {span} over yet", "what does the timer say"),
        ("is there much time left of my {span}", "when does the countdown finish", "where is the timer now"),
    ),
    "light_on": (
        ("turn on the light in the {room}", "{room} lights on", "it is too dark in the {room}", "light up the {room}",
         "switch the {room} lamp on", "I need light in the {room}", "make the {room} brighter"),
        ("I cannot see anything in the {room}", "put the {room} lamp on", "lights in the {room} please"),
    ),
    "light_off": (
        ("turn off the light in the {room}", "{room} lights off", "it is too bright in the {room}", "switch the {room} lamp off",
         "make the {room} dark", "no light in the {room} please", "kill the lights in the {room}"),
        ("the {room} lamp need not burn", "put out the light in the {room}", "nobody is in the {room}, save the power"),
    ),
    "heat_up": (
        ("make the {room} {amount} warmer", "turn the heating up in the {room}", "it is cold in the {room}",
         "raise the temperature by {amount}", "I am freezing in the {room}", "more heat please, {amount}"),
        ("the {room} is chilly", "add {amount} to the thermostat", "could the {room} be warmer"),
    ),
    "heat_down": (
        ("make the {room} {amount} cooler", "turn the heating down in the {room}", "it is hot in the {room}",
         "lower the temperature by {amount}", "I am sweating in the {room}", "less heat please, {amount}"),
        ("the {room} is stuffy and warm", "take {amount} off the thermostat", "could the {room} be cooler"),
    ),
    "list_add": (
        ("put {item} on the list", "we are out of {item}", "add {item} to my shopping", "I must buy {item}",
         "remember to get {item} {day}", "we need {item}", "write down {item}"),
        ("there is no {item} left", "{item} should go on the shopping list", "note that I need {item}"),
    ),
    "list_remove": (
        ("take {item} off the list", "I already bought {item}", "remove {item} from my shopping", "we do not need {item} any more",
         "cross out {item}", "no {item} after all", "delete {item} from the list"),
        ("strike {item}", "we have enough {item} now", "{item} can come off the list"),
    ),
    "music_play": (
        ("play {music}", "put on {music}", "I want to hear {music}", "start {music} in the {room}", "some music, {music} maybe",
         "let us listen to {music}", "{music} in the {room} please"),
        ("I am in the mood for {music}", "let me hear {music}", "could we have {music} in the {room}"),
    ),
    "music_stop": (
        ("stop {music}", "turn {music} off", "no more music in the {room}", "silence in the {room} please", "pause {music}",
         "I have heard enough of {music}", "end the music"),
        ("be quiet in the {room}", "that is enough {music}", "cut {music}"),
    ),
    "message_send": (
        ("tell {person} that {note}", "text {person} {note}", "send {person} a message saying {note}", "write to {person}: {note}",
         "let {person} know {note}", "message {person}, {note}"),
        ("drop {person} a line that {note}", "{person} should know that {note}", "pass on to {person} that {note}"),
    ),
    "calendar_add": (
        ("put {event} in my calendar {day}", "I have {event} {day} at {time}", "schedule {event} for {time} {day}",
         "book {event} {day}", "add {event} at {time}", "{event} is {day}, note it"),
        ("block {time} {day} for {event}", "enter {event} {day}", "make room {day} for {event}"),
    ),
    "calendar_query": (
        ("when is {event}", "what is on {day}", "am I free {day} at {time}", "do I have {event} {day}", "what are my plans {day}",
         "is {event} at {time} or later", "show my calendar {day}"),
        ("have I got time {day}", "at what time is {event}", "anything planned {day}"),
    ),
}  # fmt: skip
INTENTS = tuple(WORDINGS)


@dataclass(frozen=True)
class Request:
    """One sentence and the number of its intent in INTENTS."""

    text: str
    label: int
    wording: str


def requests(split: str, count: int, seed: int = 0) -> list[Request]:
    """`count` different sentences of one split, "train" or "test", as many of each intent as of the others, shuffled.

    The seed draws slots and order. Raises ValueError for another split, and where the wordings do not give so many sentences.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split is "train" or "test", got {split!r}')
    rng, found = random.Random(f"{split}/{seed}"), {}
    for label, intent in enumerate(INTENTS):
        share = count // len(INTENTS) + (label < count % len(INTENTS))
        own = sentences(intent, split)
        if len(own) < share:
            raise ValueError(f"{share} {split} sentences of {intent} are asked for, and its wordings give {len(own)}")
        found |= {text: Request(text, label, wording) for text, wording in _evenly(rng, own, share)}
    drawn = list(found.values())
    rng.shuffle(drawn)
    return drawn


def sentences(intent: str, split: str) -> dict[str, str]:
    """Every sentence of an intent → its wording."""
    return {text: wording for wording in WORDINGS[intent][split == "test"] for text in _filled(wording)}


def _filled(wording: str) -> list[str]:
    texts = [f"{before}{wording}{after}" for before in BEFORE for after in AFTER]
    for slot, values in SLOTS.items():
        if f"{{{slot}}}" in wording:
            texts = [text.replace(f"{{{slot}}}", value) for text in texts for value in values]
    return texts


def _evenly(rng: random.Random, own: dict[str, str], share: int) -> list[tuple[str, str]]:
    """`share` sentences with the wordings in turn, as long as each has some left."""
    pools: dict[str, list[str]] = {}
    for text, wording in own.items():
        pools.setdefault(wording, []).append(text)
    for pool in pools.values():
        rng.shuffle(pool)
    drawn: list[tuple[str, str]] = []
    while len(drawn) < share:
        drawn += [(pool.pop(), wording) for wording, pool in pools.items() if pool]
    return drawn[:share]
