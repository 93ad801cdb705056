"What the statistics promise, on experiments whose truth is known. `--slow` makes the kept table of error rates anew."
import numpy as np, pandas as pd, pytest
from exp2nb.config import UserError
from exp2nb.stats import (
    COVERAGE, Variances, accuracy, assumed, crossed, crossover, decide, difference, error_rates, holds_level, holm,
    majority_at_k, mcnemar_p, measured, pass_at_k, power_of, rule, seeds_needed, simulate, smallest_effect,
    smallest_margin, tost)


def experiment(gap=0., seeds=3, items=1319, sd=.01, gain=.06, seed=0):
    "Outcomes of RL, SFT+ and the SFT checkpoint of one made-up experiment."
    rng = np.random.default_rng(seed)
    a, b, _ = simulate(rng, 1, seeds, items, (.45+gap, .45), sd)
    s, _, _ = simulate(rng, 1, 1, items, (.45-gain, .45), 0.)
    return a[0], b[0], s[0]


@pytest.mark.parametrize('seeds,sd', [(3, 0.), (3, .03), (10, .015)])
def test_kept_table_agrees_with_a_fresh_short_simulation(seeds, sd):
    row = COVERAGE.query('not paired and items==1319 and accuracy==.45 and seeds==@seeds and run_sd==@sd').iloc[0]
    got = error_rates(np.random.default_rng(9), 200, seeds, run_sd=sd)
    for k in ('coverage', 'false_win', 'false_equal'): assert abs(got[k]-row[k]) < 3.5*np.sqrt(max(row[k]*(1-row[k]), .01)/200), k


def test_an_arm_against_itself_does_not_win():
    "The same method twice, other runs: wins at most as often as the level, wherever the rule may speak."
    for paired in (False, True):
        may = COVERAGE[(COVERAGE.paired==paired) & np.array([s > 1 and holds_level(s, paired) for s in COVERAGE.seeds])]
        assert len(may) and may.false_win.max() <= .05 + 2*np.sqrt(.05*.95/2000)
    one = COVERAGE[COVERAGE.seeds==1]
    assert one.coverage_checkpoints.min() >= .94 and one.coverage.min() < .6   # right about the checkpoints, wrong about the methods


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
@pytest.mark.parametrize('seeds', [1, 5])
def test_large_differences_are_found_and_worded_with_care(gap, code, seeds):
    v = decide(*experiment(gap, seeds), zero_advantage=.4)
    assert v['code']==code and v['hypothesis']
    assert ('these two checkpoints' in v['sentence']) == (seeds==1)
    assert (v['mcnemar_p'] is not None) == (seeds==1)


def test_equal_arms_with_enough_data_are_equivalent():
    v = decide(*experiment(0., 10, items=6000, sd=.004), zero_advantage=.4)
    assert v['code']=='equivalent' and v['reach']['reachable']


def test_no_signal_is_not_equivalence():
    a, b, _ = experiment(0., 10, items=6000, sd=.002)
    still = decide(a, b, a[:1])
    assert still['code']=='cannot_tell' and 'no signal' in still['reason']
    dead = decide(*experiment(.1, 5), zero_advantage=.951)
    assert dead['code']=='cannot_tell' and '95.1 %' in dead['reason']
    assert decide(*experiment(.1, 5), zero_advantage=.949)['code']=='rl_better'


def test_where_the_interval_does_not_hold_the_rule_is_silent():
    v = decide(*experiment(.15, 2), zero_advantage=.4)
    assert not holds_level(2) and v['code']=='cannot_tell' and '2 seeds' in v['reason']
    rl, sp, s = experiment(.15, 3)
    assert decide(rl, sp, s, paired=True)['code']=='cannot_tell' and decide(rl, sp, s)['code']=='rl_better'


def test_a_flip_between_conventions_is_no_verdict():
    args = experiment(.1, 5)
    assert decide(*args, others=dict(note='cannot_tell'))['code']=='rl_better'
    v = decide(*args, others=dict(note='rl_worse'))
    assert v['code']=='cannot_tell' and 'note' in v['reason']


def test_one_run_of_1319_problems_cannot_show_equivalence_within_two_points():
    a, b, s = experiment(0., 1)
    v = decide(a, b, s)
    assert not v['reach']['reachable'] and 'seeds' in v['needed']


def test_planning():
    assert np.allclose([100*smallest_effect(assumed(p), 1, 1319) for p in (.05, .1, .2, .4)], [1.7, 2.3, 3.1, 3.8], atol=.06)
    v = assumed(.45, .015)
    n = seeds_needed(.03, v, 1319)
    assert smallest_effect(v, n, 1319) <= .03 < smallest_effect(v, n-1, 1319)
    n = seeds_needed(.03, v, 1319, equivalence=True)
    assert smallest_margin(v, n, 1319) <= .03
    assert seeds_needed(.001, v, 1319) is None


def test_planned_power_is_the_power_that_comes_out():
    "Variances measured on many experiments predict how often five points are seen."
    a, b, _ = simulate(np.random.default_rng(4), 300, 5, 1319, (.475, .425), .015)
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


def test_crossing_found_and_not_found():
    rng = np.random.default_rng(6)
    def pairs(gaps): return [simulate(rng, 1, 3, 1319, (.45+g, .45), .003)[:2] for g in gaps]
    def flat(ps): return [(a[0], b[0]) for a, b in ps]
    up = crossover((.25, .5, 1.), flat(pairs((-.08, -.04, .08))))
    assert up['ahead']=='RL' and .5 < up['at'] < 1 and up['low'] <= up['at'] <= up['high']
    none = crossover((.25, .5, 1.), flat(pairs((.10, .10, .10))))
    assert none['at'] is None and 'no crossing in the range' in none['sentence']


def test_too_few_items():
    with pytest.raises(UserError, match='two problems'): crossed(np.zeros((1, 1)))


def error_table(reps, seeds=(1, 2, 3, 5, 10), run_sds=(0., .015, .03), settings=((1319, .45),), paired=(False,), seed=0):
    "`error_rates` for every combination, one row each."
    rows = []
    for pair in paired:
        for items, acc in settings:
            for s in seeds:
                for sd in run_sds:
                    rng = np.random.default_rng([seed, s, items, int(1000*sd), int(1000*acc)])
                    rates = error_rates(rng, reps, s, items, acc, sd, pair)
                    rows.append(dict(paired=pair, items=items, accuracy=acc, seeds=s, run_sd=sd, **rates))
    return pd.DataFrame(rows)


@pytest.mark.slow
def test_error_table_in_full():
    parts = [error_table(2000, settings=((1319, .45), (164, .45)), paired=(False, True), seed=1),
             error_table(2000, run_sds=(0., .015), settings=((1319, .05),), paired=(False, True), seed=1)]
    fresh = pd.concat(parts, ignore_index=True).round(3)
    assert np.allclose(fresh.select_dtypes('number'), COVERAGE.select_dtypes('number'), atol=.02, rtol=.02)
