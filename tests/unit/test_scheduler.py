"""The scheduler over a store: who takes turns, what cancelled questions leave, errors that are one's own."""

from array import array

import pytest

from nemo_star import LLM
from nemo_star.contexts.in_use import ContextsInUse
from nemo_star.contexts.store import ContextStore
from nemo_star.engine.scheduler import Question, Scheduler

BLOCK = 32
LONG = array("i", [(7 * i * i + 3 * i) % 251 for i in range(10 * BLOCK)])
SHORT = array("i", [(5 * i + 1) % 251 for i in range(2 * BLOCK)])


@pytest.fixture(scope="module")
def engine(tiny):
    return LLM(tiny, attention={"block_size": BLOCK}).engine


class Likeliest:
    """Notes nothing, ends at the length."""

    def choose(self, logits):
        return int(logits.argmax()), False


class Desk:
    """Scheduler, store and contexts in use, as the service has them."""

    def __init__(self, engine, *, budget=2**30, **settings):
        self.store = ContextStore(engine, budget_bytes=budget, fingerprint="test")
        self.contexts = ContextsInUse(engine, self.store)
        self.scheduler = Scheduler(
            engine, **{"max_batch_size": 4, "max_encodings": 2, "open_context": self.contexts.open, **settings}
        )
        self.encoded = []

    def ask(self, ids, *, owner="", answers=1, tokens=3):
        work = self.contexts.work(ids, owner=owner, on_block=lambda: self.encoded.append(len(ids)))
        question = Question(work, [3, 4], max_tokens=tokens, answers=[Likeliest() for _ in range(answers)])
        self.scheduler.add(question)
        return question

    def cancel(self, question):
        self.scheduler.cancel(question)
        self.contexts.let_go(question.work)

    def run(self):
        for question in (done := self.scheduler.run()):
            self.contexts.let_go(question.work)
        return done

    def check_nothing_left(self):
        assert self.scheduler.is_idle
        assert self.scheduler.live == 0
        assert self.scheduler.encodings == []
        assert self.store.reserve(1)
        assert all(entry.pins == 0 for entry in self.store._shelf.entries.values())


def steps(desk, count):
    return [question for _ in range(count) for question in desk.scheduler.step()]


def test_a_short_context_passes_a_long_one_which_goes_on(engine):
    desk = Desk(engine)
    long, short = desk.ask(LONG), desk.ask(SHORT)
    assert desk.run() == [short, long]
    assert sorted(desk.encoded) == [len(SHORT)] * 2 + [len(LONG)] * 10
    last_of_short = max(place for place, tokens in enumerate(desk.encoded) if tokens == len(SHORT))
    assert 0 < desk.encoded[:last_of_short].count(len(LONG)) <= 3
    desk.check_nothing_left()


def test_one_at_a_time_comes_in_order(engine):
    desk = Desk(engine, max_encodings=1)
    long, short = desk.ask(LONG), desk.ask(SHORT)
    assert desk.run() == [long, short]
    assert desk.encoded == [len(LONG)] * 10 + [len(SHORT)] * 2


@pytest.mark.parametrize("after", [1, 5, 9])
def test_a_question_that_is_cancelled_in_prefill_goes_on_where_it_stopped(engine, after):
    desk = Desk(engine)
    question = desk.ask(LONG)
    assert steps(desk, after) == []
    desk.cancel(question)
    desk.check_nothing_left()
    assert desk.scheduler.step() == []
    assert len(desk.encoded) == after
    again = desk.ask(LONG)
    assert desk.run() == [again]
    assert len(desk.encoded) == 10
    other = Desk(engine)
    expected = other.ask(LONG)
    other.run()
    assert again.tokens == expected.tokens
    desk.check_nothing_left()


def test_two_who_ask_for_one_context_encode_it_once_and_one_may_go(engine):
    desk = Desk(engine)
    first, second = desk.ask(LONG), desk.ask(LONG)
    steps(desk, 3)
    desk.cancel(first)
    assert len(desk.scheduler.encodings) == 1
    assert desk.run() == [second]
    assert len(desk.encoded) == 10
    desk.check_nothing_left()


def test_many_answers_are_not_passed_for_ever_by_few(engine):
    desk = Desk(engine)
    desk.ask(SHORT)
    desk.run()
    desk.ask(SHORT, tokens=4)
    many = desk.ask(SHORT, answers=4)
    for _ in range(12):  # there is always somebody else
        desk.ask(SHORT, tokens=4)
        done = desk.scheduler.step()
        if many in done:
            break
    assert many in done


@pytest.mark.parametrize("answers", [1, 3])
def test_an_answer_that_is_cancelled_leaves_the_others(engine, answers):
    desk = Desk(engine)
    going, staying = desk.ask(SHORT, answers=answers, tokens=50), desk.ask(SHORT, tokens=5)
    while desk.scheduler.live < answers + 1 and not staying.tokens:
        desk.scheduler.step()
    steps(desk, 2)
    desk.cancel(going)
    assert desk.scheduler.live == 1
    assert desk.run() == [staying]
    alone = Desk(engine)
    expected = alone.ask(SHORT, tokens=5)
    alone.run()
    assert staying.tokens == expected.tokens
    desk.check_nothing_left()


def test_a_context_that_cannot_be_had_ends_its_questions_alone(engine):
    room = Desk(engine)
    room.ask(SHORT)
    room.run()
    desk = Desk(engine, budget=2 * room.store.used_bytes)
    large, other, small = desk.ask(LONG), desk.ask(LONG), desk.ask(SHORT)
    done = desk.run()
    assert set(map(id, done[:2])) == {id(large), id(other)}
    assert done[2] is small
    assert "more than the budget" in large.work.error
    assert other.work is large.work
    again = desk.ask(LONG)
    assert again.work is not large.work  # a later one tries again
    assert desk.run() == [again]
    desk.check_nothing_left()


def test_who_waits_for_room_has_it_when_another_is_cancelled(engine):
    room = Desk(engine)
    room.ask(SHORT)
    room.run()
    desk = Desk(engine, budget=room.store.used_bytes * 3 // 2)
    first = desk.ask(SHORT, tokens=10**4)
    while not desk.scheduler.live:
        desk.scheduler.step()
    second = desk.ask(array("i", reversed(SHORT)))
    steps(desk, 3)
    assert second.work.encoding is None
    desk.cancel(first)
    assert desk.run() == [second]
    desk.check_nothing_left()


def test_what_is_forgotten_under_way_leaves_the_memory_unless_somebody_waits_for_it(engine):
    desk = Desk(engine)
    question = desk.ask(LONG)
    steps(desk, 2)
    desk.store.forget_text(LONG)
    assert desk.store.used_bytes > 0  # it is waited for
    desk.cancel(question)
    desk.store.forget_text(LONG)
    assert desk.store.used_bytes == 0
    assert desk.ask(LONG).work.encoding is None
    assert len(desk.run()) == 1
    assert len(desk.encoded) == 2 + 10


def test_contexts_of_others_are_not_found(engine):
    desk = Desk(engine)
    desk.ask(SHORT, owner="me")
    desk.run()
    desk.ask(SHORT, owner="you")
    desk.run()
    assert len(desk.encoded) == 4


def most_live(desk):
    most = 0
    while not desk.scheduler.is_idle:
        for question in desk.scheduler.step():
            desk.contexts.let_go(question.work)
        most = max(most, desk.scheduler.live)
    return most


def test_answers_wait_until_there_is_memory_for_their_own_tokens(engine):
    for own_tokens, together in ((None, 4), (3 * 5, 3), (5, 1), (1, 1)):  # each has a query of 2, and 3 tokens to come
        desk = Desk(engine, max_own_tokens=own_tokens)
        questions = [desk.ask(SHORT) for _ in range(4)]
        assert most_live(desk) == together
        assert all(len(question.tokens[0]) == 3 for question in questions)


def test_long_queries_run_one_after_another(engine, monkeypatch):
    monkeypatch.setattr("nemo_star.engine.scheduler.MAX_STEP_TOKENS", 5)
    rows = []
    decode = engine.decode
    monkeypatch.setattr(
        engine,
        "decode",
        lambda batch, **options: rows.append(sum(len(run) for _, run in batch)) or decode(batch, **options),
    )
    desk = Desk(engine)
    questions = [desk.ask(SHORT) for _ in range(4)]
    desk.run()
    assert all(len(question.tokens[0]) == 3 for question in questions)
    assert max(rows) <= 5


def test_a_context_larger_than_the_store_s_share_runs_alone(engine):
    size = Desk(engine).store._whole(engine.method.pinned(len(SHORT)), len(SHORT))
    desk = Desk(engine, budget=size)
    scheduler = desk.scheduler
    scheduler._open_context = lambda work: desk.contexts.open_even_alone(work, scheduler.works_in_use)
    short, long, other = desk.ask(SHORT), desk.ask(LONG), desk.ask(SHORT[:-1])
    assert set(desk.run()) == {short, long, other}
    assert all(question.work.error is None for question in (short, long, other))
    assert desk.store.used_bytes <= size
