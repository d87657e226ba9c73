"""What the mini corpus says: Mandarin sentences from templates, each with its English translation by rule.

    pair = sample(random.Random(0))          # Pair(kind="alarm", zh="明天早上七点叫我起床", en="wake me up at seven ...")
    if not pair.is_in(heldout()): ...        # what training may see

147 hanzi and 142 English words, lower case, no punctuation, so that one token per hanzi and per word is a
complete vocabulary. No kind but the digit strings has more than 8 % of the draws, and every kind has at least 150
different sentences, so holding sentences out for dev and test never empties a template.
"""

import random
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache

HELDOUT_SEED = 2408  # fixed before anything was tuned; another seed is another benchmark
TEST_PAIRS, DEV_PAIRS = 120, 60


@dataclass(frozen=True)
class Pair:
    """One sentence in both languages; ``kind`` names its template."""

    kind: str
    zh: str
    en: str

    def is_in(self, sentences: Collection[str]) -> bool:
        """Whether either language of the pair is among ``sentences``."""
        return self.zh in sentences or self.en in sentences

    def tokens(self) -> list[str]:
        """Every hanzi and every English word."""
        return [*self.zh, *self.en.split()]


def sample(rng: random.Random) -> Pair:
    """One random pair; digit strings with 32 %, every other kind with 4-8 %."""
    kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    zh, en = TEMPLATES[kind](rng.choice, rng)
    return Pair(kind, zh, en)


def sample_kind(kind: str, rng: random.Random) -> Pair:
    """One random pair of the named kind."""
    return Pair(kind, *TEMPLATES[kind](rng.choice, rng))


def draw_training(count: int, rng: random.Random) -> list[Pair]:
    """``count`` pairs, none of them held out, drawn with replacement so that even the rarest word is frequent.

    Of two candidates of one kind the one with the less used word is kept. Without that, 3000 plain draws hold
    the rarest number words about 15 times; with it, no word occurs fewer than 20 times.
    """
    held = heldout()
    kinds = spread(count)
    rng.shuffle(kinds)
    used: Counter[str] = Counter()
    pairs = []
    for kind in kinds:
        candidates: list[Pair] = []
        while len(candidates) < 2:
            pair = sample_kind(kind, rng)
            if not pair.is_in(held):
                candidates.append(pair)
        pair = min(candidates, key=lambda pair: min(used[token] for token in pair.tokens()))
        used.update(pair.tokens())
        pairs.append(pair)
    return pairs


@lru_cache
def heldout_pairs(seed: int = HELDOUT_SEED) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """The 120 test pairs and the 60 dev pairs, all different, kinds in the proportions of training."""
    rng = random.Random(seed)
    seen: set[str] = set()
    pairs: list[Pair] = []
    for count in (TEST_PAIRS, DEV_PAIRS):
        kinds = spread(count)
        rng.shuffle(kinds)
        for kind in kinds:
            pair = sample_kind(kind, rng)
            while pair.is_in(seen):
                pair = sample_kind(kind, rng)
            seen |= {pair.zh, pair.en}
            pairs.append(pair)
    return tuple(pairs[:TEST_PAIRS]), tuple(pairs[TEST_PAIRS:])


@lru_cache
def heldout(seed: int = HELDOUT_SEED) -> frozenset[str]:
    """Every test and dev sentence, in both languages: no training, of speech or of text, may use one."""
    test, dev = heldout_pairs(seed)
    return frozenset(sentence for pair in test + dev for sentence in (pair.zh, pair.en))


def spread(count: int) -> list[str]:
    """``count`` kinds in the proportions of ``WEIGHTS``, rounded by largest remainder."""
    total = sum(WEIGHTS.values())
    exact = {kind: count * weight / total for kind, weight in WEIGHTS.items()}
    counts = {kind: int(share) for kind, share in exact.items()}
    by_remainder = sorted(exact, key=lambda kind: counts[kind] - exact[kind])
    for kind in by_remainder[: count - sum(counts.values())]:
        counts[kind] += 1
    return [kind for kind, n in counts.items() for _ in range(n)]


def number(n: int) -> tuple[str, str]:
    """0..99 read as a quantity in both languages: 23 -> ("二十三", "twenty three")."""
    tens, ones = divmod(n, 10)
    if tens == 0:
        return DIGITS[ones]
    zh = (DIGITS[tens][0] if tens > 1 else "") + "十" + (DIGITS[ones][0] if ones else "")
    if tens == 1:
        return zh, TEENS[ones]
    return zh, TENS[tens - 2] + (f" {DIGITS[ones][1]}" if ones else "")


def counted(n: int) -> tuple[str, str]:
    """A number before a measure word, where Mandarin says 两 for 2."""
    return ("两", "two") if n == 2 else number(n)


def words(zh_and_en: str) -> list[tuple[str, str]]:
    """ "灯 light, 电视 television" -> [("灯", "light"), ("电视", "television")]."""
    return [tuple(item.strip().split(" ", 1)) for item in zh_and_en.split(",")]


DIGITS = words("零 zero, 一 one, 二 two, 三 three, 四 four, 五 five, 六 six, 七 seven, 八 eight, 九 nine")
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()

SWITCH = words("打开 turn on, 关闭 turn off")
ROOM = words("客厅 living room, 卧室 bedroom, 厨房 kitchen, 书房 study, 浴室 bathroom, 车库 garage")
DEVICE = words("灯 light, 电视 television, 空调 air conditioner, 窗户 window, 音响 speaker, 风扇 fan, 电脑 computer")
CITY = words(
    "北京 beijing, 上海 shanghai, 广州 guangzhou, 深圳 shenzhen, 成都 chengdu, 武汉 wuhan, "
    "伦敦 london, 巴黎 paris, 纽约 new york, 东京 tokyo"
)
DAY = words(
    "今天 today, 明天 tomorrow, 后天 the day after tomorrow, "
    "星期一 on monday, 星期二 on tuesday, 星期五 on friday, 星期天 on sunday"
)
PART = words("早上 in the morning, 下午 in the afternoon, 晚上 in the evening")
MONTH = words("一月 january, 三月 march, 五月 may, 六月 june, 八月 august, 十月 october")
FOOD = words("苹果 apples, 面包 bread, 牛奶 milk, 咖啡 coffee, 鸡蛋 eggs, 米饭 rice, 鱼 fish, 茶 tea")
PORTION = words("个苹果 apples, 个鸡蛋 eggs, 杯牛奶 cups of milk, 杯咖啡 cups of coffee, 杯茶 cups of tea")
WHO = words("我 i, 我们 we, 他们 they, 你 you")
WHOSE = words("我 my, 我们 our, 他们 their, 你 your")
AM = {"i": "i am", "we": "we are", "they": "they are", "you": "you are"}
PERSON = words("妈妈 mother, 爸爸 father, 老师 teacher, 医生 doctor, 朋友 friend")
MEDIA = words("音乐 music, 新闻 the news, 故事 a story, 电影 a movie")
FEELING = words("高兴 happy, 忙 busy, 累 tired, 饿 hungry, 冷 cold, 热 hot")

Choice = Callable[[list], tuple[str, str]]


def _digits(pick: Choice, rng: random.Random) -> tuple[str, str]:
    digits = rng.choices(DIGITS, k=rng.randint(3, 7))
    return "".join(zh for zh, _ in digits), " ".join(en for _, en in digits)


def _switch(pick: Choice, rng: random.Random) -> tuple[str, str]:
    switch, room, device = pick(SWITCH), pick(ROOM), pick(DEVICE)
    zh, en = f"{switch[0]}{room[0]}的{device[0]}", f"{switch[1]} the {device[1]} in the {room[1]}"
    return (f"请{zh}", f"please {en}") if rng.random() < 0.5 else (zh, en)


def _thermostat(pick: Choice, rng: random.Random) -> tuple[str, str]:
    room, degrees = pick(ROOM), number(rng.randint(10, 39))
    return f"把{room[0]}的空调调到{degrees[0]}度", f"set the air conditioner in the {room[1]} to {degrees[1]} degrees"


def _alarm(pick: Choice, rng: random.Random) -> tuple[str, str]:
    day, part, hour = pick(DAY), pick(PART), counted(rng.randint(1, 12))
    return f"{day[0]}{part[0]}{hour[0]}点叫我起床", f"wake me up at {hour[1]} {part[1]} {day[1]}"


def _travel(pick: Choice, rng: random.Random) -> tuple[str, str]:
    who, day, city = pick(WHO), pick(DAY), pick(CITY)
    return f"{who[0]}{day[0]}去{city[0]}", f"{who[1]} will go to {city[1]} {day[1]}"


def _date(pick: Choice, rng: random.Random) -> tuple[str, str]:
    who, month, day, city = pick(WHO), pick(MONTH), number(rng.randint(1, 30)), pick(CITY)
    return f"{who[0]}{month[0]}{day[0]}号去{city[0]}", f"{who[1]} will go to {city[1]} on {month[1]} {day[1]}"


def _weather(pick: Choice, rng: random.Random) -> tuple[str, str]:
    city, day, part = pick(CITY), pick(DAY), pick(PART)
    if rng.random() < 0.5:
        return f"{city[0]}{day[0]}的天气怎么样", f"how is the weather in {city[1]} {day[1]}"
    return f"{city[0]}{day[0]}{part[0]}会下雨吗", f"will it rain in {city[1]} {day[1]} {part[1]}"


def _shopping(pick: Choice, rng: random.Random) -> tuple[str, str]:
    who, (first, second) = pick(WHO), rng.sample(FOOD, 2)
    return f"{who[0]}想买{first[0]}和{second[0]}", f"{who[1]} want to buy {first[1]} and {second[1]}"


def _order(pick: Choice, rng: random.Random) -> tuple[str, str]:
    who, count, portion = pick(WHO), counted(rng.randint(2, 19)), pick(PORTION)
    return f"{who[0]}要{count[0]}{portion[0]}", f"{who[1]} would like {count[1]} {portion[1]}"


def _price(pick: Choice, rng: random.Random) -> tuple[str, str]:
    food, yuan = pick(FOOD), number(rng.randint(30, 99))
    return f"{food[0]}的价格是{yuan[0]}块", f"the price of {food[1]} is {yuan[1]} yuan"


def _call(pick: Choice, rng: random.Random) -> tuple[str, str]:
    person, day, part = pick(PERSON), pick(DAY), pick(PART)
    zh, en = f"{day[0]}{part[0]}给{person[0]}打电话", f"call my {person[1]} {day[1]} {part[1]}"
    return (f"提醒我{zh}", f"remind me to {en}") if rng.random() < 0.5 else (zh, en)


def _play(pick: Choice, rng: random.Random) -> tuple[str, str]:
    day, room, media = pick(DAY), pick(ROOM), pick(MEDIA)
    zh, en = f"在{room[0]}播放{media[0]}", f"play {media[1]} in the {room[1]}"
    return (f"{day[0]}{zh}", f"{en} {day[1]}") if rng.random() < 0.8 else (zh, en)


def _home(pick: Choice, rng: random.Random) -> tuple[str, str]:
    whose, person, city = pick(WHOSE), pick(PERSON), pick(CITY)
    return f"{whose[0]}的{person[0]}住在{city[0]}", f"{whose[1]} {person[1]} lives in {city[1]}"


def _feeling(pick: Choice, rng: random.Random) -> tuple[str, str]:
    who, feeling = pick(WHO), pick(FEELING)
    zh_when, en_when = pick([("", ""), ("今天", " today"), ("现在", " now")])
    zh_how, en_how = pick([("很", "very "), ("不", "not "), ("有点", "a little ")])
    return f"{who[0]}{zh_when}{zh_how}{feeling[0]}", f"{AM[who[1]]} {en_how}{feeling[1]}{en_when}"


TEMPLATES: dict[str, Callable[[Choice, random.Random], tuple[str, str]]] = {
    "digits": _digits,
    "switch": _switch,
    "thermostat": _thermostat,
    "alarm": _alarm,
    "travel": _travel,
    "date": _date,
    "weather": _weather,
    "shopping": _shopping,
    "order": _order,
    "price": _price,
    "call": _call,
    "play": _play,
    "home": _home,
    "feeling": _feeling,
}
# Percent of the draws. Kinds whose words occur nowhere else (devices, months, feelings, tens) get a little more.
WEIGHTS = {
    "digits": 32,
    "switch": 8,
    "date": 6,
    "feeling": 6,
    "order": 6,
    "price": 6,
    "alarm": 5,
    "thermostat": 5,
    "travel": 5,
    "weather": 5,
    "call": 4,
    "home": 4,
    "play": 4,
    "shopping": 4,
}
