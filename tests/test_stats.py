"What the statistics promise, on experiments whose truth is known. `--slow` makes the kept table of error rates anew."
import numpy as np, pandas as pd, pytest
from exp2nb.config import UserError
from exp2nb.stats import (
    CODES, COVERAGE, HYPOTHESES, RUN_EXECUTED, Variances, accuracy, agreed, assumed, chance_equivalent, coverage_rates, crossed,
    crossover, decide, difference, fewest_seeds, holds_level, holm, judge, latent_of, majority_at_k, mcnemar_p, measured, pass_at_k,
    points, power_of, rule, seeds_needed, simulate, smallest_effect, smallest_margin, tost, verdict_rates, verdicts)


def world(gap=0., seeds=10, own=True, items=1319, sd=.005, gain=.06, sft_plus=.45, executed=None, seed=0, **kw):
    "Outcomes of RL, SFT+ on two bases and the SFT checkpoints of one simulated experiment."
    acc = (sft_plus+gap, sft_plus, sft_plus if executed is None else executed)
    w = simulate(np.random.default_rng(seed), 1, seeds, items, acc, sd, own_start=own, sft=.45-gain, **kw)
    return (*(x[0] for x in w.arms), w.sft[0])


def verdict(gap=0., seeds=10, own=True, zero=.4, **kw):
    "The whole rule on such an experiment, with SFT+ matched on `executed` as well."
    rl, model, executed, sft = world(gap, seeds, own, **kw)
    return decide(rl, model, sft, zero, paired=own, others=dict(executed=judge(rl, executed, sft, zero, paired=own)))


@pytest.mark.parametrize('seeds,sd,paired', [(3, 0., False), (3, .03, False), (10, .01, True)])
def test_kept_table_agrees_with_a_fresh_short_simulation(seeds, sd, paired):
    row = COVERAGE.query('paired==@paired and gap_sd==0 and items==1319 and accuracy==.45 and seeds==@seeds and run_sd==@sd').iloc[0]
    got = coverage_rates(np.random.default_rng(9), 200, seeds, run_sd=sd, paired=paired)
    for k in ('coverage', 'coverage_start', 'false_win'): assert abs(got[k]-row[k]) < 3.5*np.sqrt(max(row[k]*(1-row[k]), .01)/200), k


def test_methods_that_are_equal_have_no_winner():
    "Wherever the verdict may speak of the methods, at most as often as the level says; one SFT checkpoint speaks of itself only."
    spoken = COVERAGE.dropna(subset='verdict_win')
    assert len(spoken) and all(holds_level(s, p) for s, p in zip(spoken.seeds, spoken.paired, strict=True))
    of_methods = spoken[spoken.paired | (spoken.gap_sd==0)]
    assert of_methods[['verdict_win', 'verdict_equal']].max().max() <= .05 + 2*np.sqrt(.05*.95/400)
    shared = COVERAGE.query('not paired and gap_sd==.02 and seeds==10')
    assert shared.coverage_start.min() > .94 and shared.coverage.min() < .7
    one = COVERAGE[COVERAGE.seeds==1]
    assert one.coverage_checkpoints.min() >= .93 and one.coverage.min() < .6   # right about the checkpoints, wrong about the methods


def test_the_very_same_answers_are_never_a_winner():
    rng = np.random.default_rng(0)
    for seeds in (1, 3, 5):
        a = rng.random((seeds, 400)) < .5
        for paired in (False, True): assert str(rule(difference(a, a, paired))) in ('equivalent', 'cannot_tell')
    nothing = difference(np.zeros((1, 1319)), np.zeros((1, 1319)))
    assert nothing.mean==0 and 0 < nothing.interval()[1] < .004


def test_one_seed_matches_the_textbook():
    rng = np.random.default_rng(1)
    a, b = (rng.random((2, 1, 700)) < .4).astype(float)
    d = (a-b)[0]
    assert np.isclose(crossed(a, -b, pretend=False).se, d.std(ddof=1)/np.sqrt(len(d)))
    assert np.isclose(crossed(a-b, pretend=False).se, crossed(a, -b, pretend=False).se)


def test_seeds_of_one_block_match_the_two_way_formula():
    rng = np.random.default_rng(2)
    d = rng.standard_normal((6, 1)) + rng.standard_normal((1, 50)) + rng.standard_normal((6, 50))
    S, I = d.shape
    rows, cols = d.mean(1), d.mean(0)
    ms_seed, ms_item = I*rows.var(ddof=1), S*cols.var(ddof=1)
    ms_rest = ((d-rows[:, None]-cols+d.mean())**2).sum()/((S-1)*(I-1))
    assert np.isclose(crossed(d, pretend=False).se**2, (ms_seed+ms_item-ms_rest)/(S*I))


def test_equivalence_is_the_90_percent_interval_inside_the_margin():
    rng = np.random.default_rng(3)
    for _ in range(50):
        e = difference(rng.random((3, 300)) < .5, rng.random((3, 300)) < .5)
        low, high = e.interval(.90)
        assert (float(tost(e, .05)) < .05) == (low > -.05 and high < .05)


@pytest.mark.parametrize('gap,code', [(.10, 'rl_better'), (-.10, 'rl_worse')])
@pytest.mark.parametrize('seeds,own,scope', [(3, False, 'one_sft_checkpoint'), (10, True, 'methods')])
def test_large_differences_are_found_and_their_scope_said(gap, code, seeds, own, scope):
    v = verdict(gap, seeds, own)
    assert (v['code'], v['scope'], v['hypothesis'])==(code, scope, HYPOTHESES[code])
    assert ('about that checkpoint' in v['sentence'])==(scope=='one_sft_checkpoint')
    assert ('above' if gap>0 else 'below') in v['sentence'] and 'billed' in v['sentence'] and 'executed' in v['sentence']
    assert (v['needed'] is None)==(scope=='methods')

def test_what_would_decide_is_about_what_was_compared():
    "Three seeds from one SFT checkpoint: a number of seeds about that checkpoint, and what it takes to speak of the methods."
    v = verdict(.01, 3, False, items=300)
    assert v['code']=='cannot_tell' and 'between the arms from this SFT checkpoint' in v['needed']
    assert v['needed'].endswith('At least 10 seeds, each from its own SFT checkpoint, to speak of the methods.')
    one = verdict(.01, 1, False)
    assert 'if the gap differs by 2 points from seed to seed' in one['sentence'] and 'four of five experiments' in one['needed']


@pytest.mark.parametrize('gap', [-.10, 0., .10])
def test_one_seed_speaks_of_two_checkpoints(gap):
    v = verdict(gap, 1, False)
    assert (v['code'], v['scope'], v['hypothesis'])==('cannot_tell', 'two_checkpoints', None)
    assert 'one seed compares two checkpoints' in v['sentence'] and 'seeds' in v['needed'] and v['mcnemar_p'] is not None
    low, high = v['interval']
    assert low < v['difference'] < high and all(b['code']=='cannot_tell' for b in v['by_basis'].values())


@pytest.mark.parametrize('seeds,own,speaks', [(2, False, False), (3, False, True), (3, True, False), (9, True, False), (10, True, True)])
def test_how_many_seeds_speak(seeds, own, speaks):
    v = verdict(.12, seeds, own)
    assert holds_level(seeds, own)==speaks and (v['code']=='rl_better')==speaks
    if not speaks: assert 'too few' in v['sentence'] and v['interval'][0] > 0


def test_seeds_that_share_sft_checkpoints_count_once():
    rl, sft_plus, executed, sft = world(.12, 10)
    others = dict(executed=judge(rl, executed, sft, paired=True))
    assert decide(rl, sft_plus, sft, paired=True, others=others)['code']=='rl_better'
    five = decide(rl, sft_plus, sft, paired=True, others=others, starts=5)
    assert five['code']=='cannot_tell' and '10 seeds from 5 SFT checkpoints' in five['sentence']


def test_equal_arms_with_enough_data_are_equivalent():
    v = verdict(0., 10, items=6000, sd=.004)
    assert v['code']=='equivalent' and v['reach']['reachable'] and 'within ±2.0' in v['sentence'] and 'Other tasks' in v['sentence']


@pytest.mark.parametrize('a', CODES)
@pytest.mark.parametrize('b', [*CODES, None])
def test_both_ways_of_counting_must_agree(a, b):
    "All pairs of codes; None: not run. `note` and `seconds` never decide."
    gap = dict(rl_better=.10, rl_worse=-.10).get(a, 0.)
    rl, sft_plus, _, sft = world(gap, items=6000, sd=.004, gain=0. if a=='cannot_tell' else .02)
    one = judge(rl, sft_plus, sft, .4, paired=True)
    assert one['code']==a
    others = {} if b is None else dict(executed=one | dict(code=b))
    v = decide(rl, sft_plus, sft, .4, paired=True, others=others | {k: one | dict(code='rl_worse') for k in ('note', 'seconds')})
    assert v['code']==(a if a==b else 'cannot_tell')==str(agreed(a, b))
    assert set(v['by_basis'])=={'model', *others, 'note', 'seconds'} and v['hypothesis']==(HYPOTHESES.get(a) if a==b else None)
    if b is None and a!='cannot_tell': assert 'executed not run' in v['sentence'] and 'match_on executed' in v['needed']
    elif a!=b and a!='cannot_tell':   # uncertain is no other answer
        says, needs = ('open at equal executed', 'At equal executed') if b=='cannot_tell' else ('depends on how FLOPs are', 'will not help')
        assert says in v['sentence'] and needs in v['needed']


def test_one_experiment_and_many_get_the_same_verdict():
    for own, seeds in ((False, 3), (True, 10)):
        w = simulate(np.random.default_rng(2), 20, seeds, 600, (.5, .47, .47), own_start=own)
        one = [decide(a, b, s, paired=own, others=dict(executed=judge(a, c, s, paired=own)))['code'] for a, b, c, s in zip(*w.arms, w.sft)]
        assert verdicts(w, paired=own).tolist()==one


def test_a_hypothesis_needs_what_it_speaks_of():
    "RL unchanged and SFT+ harmed is no praise of RL; two arms harmed alike are not equal gains."
    harmed = verdict(.05, 10, gain=0., sft_plus=.40, seed=1)
    both = verdict(0., 10, gain=0., sft_plus=.40, items=6000)
    for v in (harmed, both): assert v['code']=='cannot_tell' and v['hypothesis'] is None and 'no gain' in v['reason']
    assert [n.split(' lowered')[0] for n in harmed['notes']]==['Extra SFT', 'Extra SFT with equal executed FLOPs']
    assert [n.split(' lowered')[0] for n in both['notes']]==['RL', 'Extra SFT', 'Extra SFT with equal executed FLOPs']
    fell = verdict(-.12, 10, gain=.06)                    # SFT+ gained, RL fell
    assert fell['code']=='rl_worse' and fell['hypothesis'] and fell['notes'][0].startswith('RL lowered')

def test_extra_sft_has_to_gain_on_both_ways_of_counting():
    "SFT+ with equal executed FLOPs that fell is named, and no gain is claimed for it."
    better = verdict(.04, 10, sft_plus=.46, executed=.40, gain=.0, items=20_000)
    assert better['code']=='rl_better' and better['hypothesis']==HYPOTHESES['rl_better']
    assert [n.split(' lowered')[0] for n in better['notes']]==['Extra SFT with equal executed FLOPs']
    alike = verdict(-.003, 10, sft_plus=.46, executed=.442, gain=.0, items=20_000, sd=.001)
    assert alike['code']=='equivalent' and alike['hypothesis'] is None
    assert alike['notes'][0].startswith('Extra SFT with equal executed FLOPs lowered') and 'No hypothesis follows' in alike['notes'][-1]


def test_no_signal_is_not_equivalence():
    still = verdict(0., 10, items=6000, sd=.002, gain=0.)
    assert still['code']=='cannot_tell' and 'no gain' in still['reason']
    dead = verdict(.1, 10, zero=.951)
    assert dead['code']=='cannot_tell' and '95.1 %' in dead['reason'] and 'easier task' in dead['needed']
    assert verdict(.1, 10, zero=.949)['code']=='rl_better'


def test_reach_is_a_simulated_chance():
    "At a half-width just inside the margin, equivalence is shown in few experiments: it is not in reach."
    v = Variances(.05, .15, 0.)
    items = next(n for n in range(500, 20_000, 50) if smallest_margin(v, 3, n, .05) < .02)
    assert chance_equivalent(.02, v, 3, items) < .1 and chance_equivalent(.02, v, 3, 20*items) > .9
    assert not verdict(0., 1, False)['reach']['reachable']


def test_disagreements_give_the_simulation_back():
    w = simulate(np.random.default_rng(0), 1, 3, 30_000, run_sd=0., rho=.6, stay=.3)
    found = latent_of(*(x[0] for x in w.arms))
    assert abs(found['rho']-.6) < .05 and abs(found['stay']-.3) < .08


def test_disagreements_of_pairs_give_the_simulation_back():
    "Where each seed has an SFT checkpoint of its own, the arms of a seed agree more than those of two."
    w = simulate(np.random.default_rng(0), 1, 4, 30_000, run_sd=0., own_start=True, rho=.7, stay=.3, start=.3)
    found = latent_of(*(x[0] for x in w.arms), paired=True)
    assert abs(found['rho']-.7) < .04 and abs(found['start']-.3) < .06 and abs(found['stay']-.3) < .1


def test_no_reach_where_the_rule_is_silent():
    "One seed, or five pairs, get no verdict however many the problems: nothing could be shown."
    for seeds, own in ((1, False), (5, True)):
        reach = verdict(0., seeds, own, items=6000)['reach']
        assert not reach['speaks'] and reach['chance_equivalent']==0 and not reach['reachable']
    assert verdict(0., 10, True)['reach']['speaks']


def test_planning():
    assert np.allclose([100*smallest_effect(assumed(p), 1, 1319) for p in (.05, .1, .2, .4)], [1.7, 2.3, 3.1, 3.8], atol=.08)
    v = assumed(.45, .015)
    n = seeds_needed(.03, v, 1319)
    assert smallest_effect(v, n, 1319) <= .03 < smallest_effect(v, n-1, 1319)
    n = seeds_needed(.03, v, 1319, equivalence=True)
    assert smallest_margin(v, n, 1319) <= .03
    assert seeds_needed(.001, v, 1319) is None and seeds_needed(.5, v, 1319)==fewest_seeds(False)
    assert seeds_needed(.5, v, 1319, paired=True)==fewest_seeds(True)==10


def test_planned_power_is_the_power_that_comes_out():
    "Variances measured on many experiments predict how often five points are seen."
    a, b = simulate(np.random.default_rng(4), 300, 5, 1319, (.475, .425), .015, rho=.5, stay=.5).arms
    parts = [measured(x, y) for x, y in zip(a[:80], b[:80], strict=True)]
    v = Variances(*(float(np.mean([getattr(p, k) for p in parts])) for k in ('item', 'noise', 'run')))
    assert .7 < v.run/(2*.015**2) < 1.4
    found = np.mean(np.isin(rule(difference(a, b)), 'rl_better'))
    assert abs(found-power_of(.05, v, 5, 1319)) < .1


def test_wilson_stays_inside():
    for x in (np.zeros((1, 50)), np.ones((3, 50)), np.zeros((3, 50))):
        p, low, high = accuracy(x)
        assert 0 <= low <= p <= high <= 1 and high-low > .01


def test_holm_and_mcnemar():
    assert np.allclose(holm([.01, .04, .03]), [.03, .06, .06]) and len(holm([]))==0
    assert mcnemar_p([1, 0, 1], [1, 0, 1])==1


def test_pass_and_majority_against_brute_force():
    from itertools import combinations
    rng = np.random.default_rng(5)
    preds = rng.integers(0, 3, (40, 6)).astype(str).astype(object)
    right = preds=='0'
    for k in (1, 2, 3, 6):
        want = [np.mean([r[list(c)].any() for c in combinations(range(6), k)]) for r in right]
        assert np.allclose(pass_at_k(6, right.sum(1), k), want)
    def vote(row, chosen):
        names, counts = np.unique([row[i] for i in chosen], return_counts=True)
        top = names[counts==counts.max()]
        return ('0' in top)/len(top)
    want = np.mean([[vote(r, c) for c in combinations(range(6), 3)] for r in preds])
    assert abs(majority_at_k(preds, right, 3, draws=300).mean()-want) < .02
    with pytest.raises(UserError, match='at least 7'): pass_at_k(6, 3, 7)
    assert np.isclose(pass_at_k(5000, 2, 2500), 1-2500*2499/(5000*4999)) and pass_at_k(1031, np.array([0, 1031]), 500).tolist()==[0., 1.]


def test_crossing_found_and_not_found():
    rng = np.random.default_rng(6)
    def pairs(gaps, seeds=3): return [[x[0] for x in simulate(rng, 1, seeds, 1319, (.45+g, .45), .003).arms] for g in gaps]
    up = crossover((.25, .5, 1.), pairs((-.08, -.04, .08)))
    assert up['ahead']=='RL' and .5 < up['at'] < 1 and up['low'] <= up['at'] <= up['high']
    once = crossover((.25, .5, 1.), pairs((-.08, -.04, .08), 1))
    assert 'these checkpoints' in once['sentence'] and 'these checkpoints' not in up['sentence']
    none = crossover((.25, .5, 1.), pairs((.10, .10, .10)))
    assert none['at'] is None and 'no crossing in the range: RL is ahead at every' in none['sentence']
    same = crossover((.25, .5, 1.), [(np.zeros((3, 9)), np.zeros((3, 9)))]*3)
    assert 'no crossing in the range: the two score the same at every budget' in same['sentence']


def test_a_crossing_is_drawn_in_pairs_and_few_seeds_get_no_winner():
    "Checkpoints that differ by five points shift both arms alike: in pairs they do not widen the crossing."
    rng = np.random.default_rng(2)
    starts = rng.normal(.5, .05, 10)
    def arm(gap): return (rng.random((10, 1319)) < np.clip(starts+gap, 0, 1)[:,None]).astype(float)
    pairs = [(arm(g), arm(0)) for g in (-.05, -.02, .05)]
    apart, together = (crossover((.25, .5, 1.), pairs, paired=p, same=p) for p in (False, True))
    assert apart['at']==together['at'] and together['high']-together['low'] < .7*(apart['high']-apart['low'])
    assert together['sentence'].startswith('RL is ahead from budget')
    few = crossover((.25, .5, 1.), [(a[:3], b[:3]) for a, b in pairs], paired=True, same=True)
    assert "RL's mean is higher from budget" in few['sentence'] and few['sentence'].endswith('3 seeds a point, too few for a verdict')
    with pytest.raises(ValueError, match='no pairs'): difference(pairs[0][0], pairs[0][1][:3], paired=True)


def test_a_missing_executed_seed_is_the_reason_not_the_counting():
    "RL far ahead on both bases, nine of ten seeds on executed: the verdict names what is missing."
    rng = np.random.default_rng(4)
    rl, plus, sft = ((rng.random((10, 600)) < p).astype(float) for p in (.6, .45, .4))
    v = decide(rl, plus, sft, paired=True, others=dict(executed=judge(rl[:9], plus[:9], sft[:9], paired=True)))
    assert v['code']=='cannot_tell' and 'was run for 9 of 10 seeds' in v['sentence'] and '; 9 seeds)' in v['sentence']
    assert v['needed']==RUN_EXECUTED


def test_an_interval_s_end_shows_its_side_of_zero():
    assert (points(-.0003, True), points(0., True), points(.0003, True), points(-.012, True))==('−0.03', '+0.0', '+0.03', '−1.2')


def test_too_few_items():
    with pytest.raises(UserError, match='two problems'): crossed(np.zeros((1, 1)))


@pytest.mark.slow
def test_kept_table_in_full():
    "`coverage.csv`, made anew: the interval from 6,000 experiments a row, the verdict from 400 where it may speak."
    for row in COVERAGE.itertuples():
        design = dict(seeds=row.seeds, items=row.items, accuracy=row.accuracy, run_sd=row.run_sd, gap_sd=row.gap_sd, paired=row.paired)
        key = [int(row.paired), row.seeds, row.items, int(1000*row.run_sd), int(1000*row.accuracy), int(1000*row.gap_sd)]
        rng = np.random.default_rng([1, *key])
        fresh = pd.DataFrame([coverage_rates(rng, 100, **design) for _ in range(60)]).mean()
        if np.isfinite(row.verdict_win):
            rng = np.random.default_rng([2, *key])
            fresh = pd.concat([fresh, pd.DataFrame([verdict_rates(rng, 50, **design) for _ in range(8)]).mean()])
        assert np.allclose(fresh, [getattr(row, k) for k in fresh.index], atol=.02, rtol=.02), row
