"What the training loop reads is made ahead of it, and is what a loop without a thread would have made."
import random, threading
from types import SimpleNamespace
import pytest, torch
from exp2nb.config import UserError, seed_of
from exp2nb.train import Conversations, Kept

def length(j): return 2 + seed_of('length', j)%30
CONVS = [dict(messages=[dict(role='user', content=str(j))]) for j in range(50)]

def render(conv):
    n = length(int(conv['messages'][0]['content']))
    return [n]*n, [0]*(n-1)+[1]

TOK = SimpleNamespace(render=render)

def in_order(passes, context):
    "All conversations of so many passes, without a thread, and how many were too long before each."
    out, dropped = [], 0
    for epoch in range(passes):
        for j in torch.randperm(50, generator=torch.Generator().manual_seed(seed_of('order', 7, epoch))).tolist():
            if length(j) > context: dropped += 1
            else: out.append((render(CONVS[j]), dropped))
    return out

@pytest.mark.parametrize('kept', [False, True])
def test_any_way_of_reading_gives_the_order_of_a_loop(kept, tmp_path):
    rng, want = random.Random(0), in_order(12, context=24)
    stream = Conversations(CONVS, TOK, 7, 24, Kept(tmp_path/'t.sqlite') if kept else None)
    at = 0
    while at < 300:
        got = stream.peek(rng.randrange(400))
        assert got==[x for x,_ in want[at:at+len(got)]]
        k = rng.randint(1, len(got))
        stream.advance(k)
        at += k
        assert stream.dropped==want[at-1][1]
        if rng.random() < .3:   # stopped, and begun again elsewhere
            state = stream.state
            stream = Conversations(CONVS, TOK, 7, 24, Kept(tmp_path/'t.sqlite') if kept else None)
            stream.load(state)

def test_a_position_is_loaded_while_the_thread_works():
    stream = Conversations(CONVS, TOK, 7, 40)
    first, start = stream.peek(200), dict(stream.state)
    for _ in range(20):
        stream.advance(3)       # the thread begins a part
        stream.load(start)
        assert stream.peek(200)==first

def test_an_error_is_raised_when_its_conversation_is_due():
    "Not when the thread meets it; and what came before is there."
    order = torch.randperm(50, generator=torch.Generator().manual_seed(seed_of('order', 7, 0))).tolist()
    bad = order[30]
    def broken(conv):
        if conv is CONVS[bad]: raise UserError('row 30 is damaged')
        return render(conv)
    stream = Conversations(CONVS, SimpleNamespace(render=broken), 7, 40)
    for i in range(30):
        assert stream.peek(0)==[render(CONVS[order[i]])]
        stream.advance(1)
    for _ in range(2):
        with pytest.raises(UserError, match='row 30 is damaged'): stream.peek(0)

def test_the_loop_renders_nothing_itself():
    names = set()
    def watched(conv): return names.add(threading.current_thread().name) or render(conv)
    stream = Conversations(CONVS, SimpleNamespace(render=watched), 7, 40)
    for _ in range(30): stream.advance(len(stream.peek(50)))
    assert len(names)==1 and next(iter(names)).startswith('text')

@pytest.mark.parametrize('trouble', ['full', 'no folder'])
def test_a_disk_that_cannot_keep_tokens_stops_no_training(trouble, tmp_path, capfd):
    (tmp_path/'file').touch()
    path = tmp_path/('t.sqlite' if trouble=='full' else 'file/t.sqlite')
    stream = Conversations(CONVS, TOK, 7, 40, Kept(path, most=0 if trouble=='no folder' else 4096))
    want = [x for x,_ in in_order(3, 40)]
    assert stream.peek(1500)==want[:len(stream.peek(1500))]
    assert capfd.readouterr().err.count('tokens are no longer kept there')==1
