"""The text the demo model learns from: conversations and short stories, generated from templates by a seeded generator."""

from collections.abc import Callable, Sequence
from random import Random

from inference.demo.facts import CAPITALS, COLOURS, NUMBERS, OPPOSITES, SMALL_TALK, SUBJECTS, WHY

Message = dict[str, str]

QUESTIONS = (
    "What is {}?", "What is {}?", "Tell me about {}.", "Explain {}.", "Can you explain {}?", "Do you know what {} is?",
    "I would like to know more about {}.", "Describe {} in a few sentences.", "Please tell me what {} is.", "How does {} work?",
    "Write a short text about {}.", "Say something about {}.", "Explain to me what {} is, please.",
)  # fmt: skip
BRIEF_QUESTIONS = ("In one sentence, what is {}?", "What is {}? Be brief.", "Explain {} in one sentence.", "Define {}.")
PLURAL_QUESTIONS = (
    "Tell me about {}.", "What are {}?", "How do {} work?", "Explain {}.", "What do you know about {}?", "Why are {} useful?",
    "Write about {}.",
)  # fmt: skip
SYSTEM = (
    "You are a helpful assistant.",
    "You are a friendly guide to rivers and dams.",
    "Answer briefly.",
    "Be kind and clear.",
)
UNKNOWN = (
    "I do not know much about that. I am a very small model, and I know about rivers, dams, turbines and queues.",
    "That is more than I know. Ask me about rivers, dams, turbines or queues, and I will do my best.",
    "I am too small to know that. I can tell you about water, power and queues, or tell you a story.",
)
STRANGE_QUESTIONS = (
    "Who won the {} in {}?", "Write a {} program that sorts a {}.", "How do I cook {} with {}?", "What do you think about {} and {}?",
    "Translate {} into {}.", "What is the price of {} in {}?", "Give me a recipe for {} and {}.", "Is {} better than {}?",
    "Summarise {} for my {}.", "Plan a trip to {} with my {}.", "Which {} should I buy for my {}?", "Write a poem about {} and {}.",
)  # fmt: skip
STRANGE_THINGS = (
    "python", "football", "a sorted list", "chess", "soup", "the stock market", "history", "music", "1998", "a laptop", "rice",
    "the president", "my sister", "space", "quantum physics", "films", "bread", "mathematics", "my garden", "cats", "the law",
    "tennis", "poetry", "2024", "shoes", "medicine", "a database", "cheese", "a guitar", "taxes", "the moon landing",
)  # fmt: skip
NAMES = ("Anna", "Mara", "Lily", "Rosa", "Ida", "Nina")
# After her first sentence the hero is "she": two layers of attention learn to copy a name only with far more text.
PLACES = (
    "by the river",
    "near the old mill",
    "below the dam",
    "at the edge of the lake",
    "in a small village",
    "beside the canal",
)
JOBS = ("a miller", "a fisher", "an engineer", "a sailor", "a farmer", "a teacher", "a gate keeper")
OPENINGS = (
    "Once upon a time, {name} lived {place} and worked as {job}.",
    "There was once {job} called {name}, who lived {place}.",
    "Long ago, {job} named {name} had a house {place}.",
    "{name} was {job} and lived {place}.",
)
EPISODES = (
    ("One night the rain did not stop, and the water rose higher and higher.", "She ran to the dam and opened the gate a little at a time.", "By morning the water was calm, and the houses were safe."),
    ("One morning the mill stood still, because the stream was almost dry.", "She walked up the hill and found a fallen tree in the water.", "With the help of a neighbour the tree was moved, and the wheel began to turn."),
    ("In summer many boats came to the lock, and everyone wanted to be first.", "She drew a line in the sand and asked them to wait in turn.", "Nobody waited long, and the captains shook hands."),
    ("In winter the lake froze, and the children were cold.", "She lit a fire and told them how the turbine makes light.", "They fell asleep while the snow was falling."),
    ("One day a small boat was caught in the fast water.", "She threw a rope and pulled it to the bank.", "The sailor inside was wet, but very glad."),
    ("One evening all the lights in the village went out.", "She took a lamp and found leaves in front of the turbine.", "When they were gone, the lights came back, and people sang in the street."),
    ("One spring a salmon could not pass the dam.", "She built a ladder of small pools beside the wall.", "Soon many fish climbed it, and the river was full of life."),
    ("A rich man once wanted all the water for himself.", "She showed him that every field needs its share.", "The man was ashamed and opened his gate."),
)  # fmt: skip
ENDINGS = (
    "From that day on, she was known to everyone as a friend of the river.",
    "And so she learned that calm work is better than hurry.",
    "She smiled and went home.",
    "After that, the river and the village lived in peace.",
)
STORY_QUESTIONS = (
    "Tell me a story.", "Can you tell me a story?", "Tell me a short story.", "Write a story about a river.", "I want to hear a story.",
    "Please tell me a story about a dam.", "Write a short story.", "Tell my children a story.",
)  # fmt: skip
LONG_STORY_QUESTIONS = (
    "Tell me a long story.",
    "Write a long story about a river.",
    "Please tell me a long story.",
    "I want a long story.",
)


def story(random: Random, num_episodes: int) -> str:
    """A story of one hero and `num_episodes` episodes, which follow each other in a circle."""
    words = {"name": random.choice(NAMES), "place": random.choice(PLACES), "job": random.choice(JOBS)}
    sentences = [random.choice(OPENINGS)]
    first = random.randrange(len(EPISODES))
    for number in range(first, first + num_episodes):
        sentences += EPISODES[number % len(EPISODES)]
    sentences.append(random.choice(ENDINGS))
    return " ".join(sentences).format(**words)


def sentences(paragraph: str, num_sentences: int) -> str:
    """The first sentences of a paragraph."""
    return ". ".join(paragraph.rstrip(".").split(". ")[:num_sentences]) + "."


def _about(random: Random) -> tuple[str, str]:
    subject, paragraph = random.choice(list(SUBJECTS.items()))
    if random.random() < 0.15:
        return random.choice(BRIEF_QUESTIONS).format(subject), sentences(paragraph, 1)
    if subject.startswith("a ") and random.random() < 0.15:
        return random.choice(PLURAL_QUESTIONS).format(_plural(subject)), sentences(paragraph, 4)
    return random.choice(QUESTIONS).format(subject), sentences(paragraph, random.choice((2, 3, 4, 4)))


def _plural(subject: str) -> str:
    noun = subject.removeprefix("a ")
    if noun.endswith("fish"):
        return noun
    if noun.endswith("y"):
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith("ch") else "s")


def _why(random: Random) -> tuple[str, str]:
    question, answer = random.choice(list(WHY.items()))
    return random.choice(("Why {}?", "Why {}?", "Can you tell me why {}?", "Explain why {}.")).format(question), answer


def _table(random: Random) -> tuple[str, str]:
    kind = random.randrange(4)
    if kind == 0:
        country, city = random.choice(list(CAPITALS.items()))
        question = random.choice(
            ("What is the capital of {}?", "Which city is the capital of {}?", "Name the capital of {}.")
        )
        return question.format(country), f"It is {city}."
    if kind == 1:
        word, opposite = random.choice(list(OPPOSITES.items()))
        return f"What is the opposite of {word}?", f"It is {opposite}."
    if kind == 2:
        thing, colour = random.choice(list(COLOURS.items()))
        return random.choice((f"What colour is {thing}?", f"What color is {thing}?")), f"It is {colour}."
    a, b = random.randrange(1, 6), random.randrange(1, 6)
    sign = random.choice((" + ", "+", " plus "))
    return random.choice((f"What is {a}{sign}{b}?", f"How much is {a}{sign}{b}?")), f"It is {NUMBERS[a + b]}."


def _small_talk(random: Random) -> tuple[str, str]:
    questions, answers = random.choice(SMALL_TALK)
    return random.choice(questions), random.choice(answers)


def _unknown(random: Random) -> tuple[str, str]:
    question = random.choice(STRANGE_QUESTIONS).format(*random.sample(STRANGE_THINGS, 2))
    return question, random.choice(UNKNOWN)


def _story(random: Random) -> tuple[str, str]:
    if random.random() < 0.3:
        return random.choice(LONG_STORY_QUESTIONS), story(random, random.randint(3, 5))
    return random.choice(STORY_QUESTIONS), story(random, 1)


TURNS: Sequence[tuple[float, Callable[[Random], tuple[str, str]]]] = (
    (0.58, _about), (0.09, _why), (0.12, _table), (0.09, _small_talk), (0.05, _unknown), (0.07, _story),
)  # fmt: skip


def _typed(random: Random, question: str) -> str:
    """The question as people type it: sometimes in lower case, sometimes without its last mark."""
    if random.random() < 0.25:
        question = question.lower()
    if random.random() < 0.2:
        question = question.rstrip("?.!")
    return question


def conversation(random: Random) -> list[Message]:
    """One to three questions with their answers, sometimes behind a system message."""
    messages = [{"role": "system", "content": random.choice(SYSTEM)}] if random.random() < 0.2 else []
    for _ in range(random.choices((1, 2, 3), (8, 2, 1))[0]):
        make = random.choices([turn for _, turn in TURNS], [weight for weight, _ in TURNS])[0]
        question, answer = make(random)
        messages.append({"role": "user", "content": _typed(random, question)})
        messages.append({"role": "assistant", "content": answer})
    return messages


def plain_text(random: Random) -> str:
    """A text without a conversation around it: a story or a paragraph."""
    if random.random() < 0.4:
        return story(random, random.randint(1, 3))
    return random.choice(list(SUBJECTS.values()))
