"""Real scikit-learn and NLTK on a pool give exactly a serial run's numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import skyward_lite as sky
from joblib import parallel_config
from nltk.stem import PorterStemmer
from nltk.tokenize import TreebankWordTokenizer, WordPunctTokenizer
from nltk.util import parallelize_preprocess
from scipy import sparse
from sklearn import config_context, get_config
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import MeanShift
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_digits, load_iris, make_regression
from sklearn.decomposition import LatentDirichletAllocation, MiniBatchDictionaryLearning
from sklearn.ensemble import (
    BaggingClassifier,
    ExtraTreesRegressor,
    IsolationForest,
    RandomForestClassifier,
    StackingClassifier,
    VotingClassifier,
)
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.feature_selection import RFECV, SequentialFeatureSelector
from sklearn.impute import SimpleImputer
from sklearn.inspection import permutation_importance
from sklearn.linear_model import LassoCV, LogisticRegression, SGDClassifier, TheilSenRegressor
from sklearn.metrics import pairwise_distances
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    RandomizedSearchCV,
    cross_val_predict,
    cross_val_score,
    cross_validate,
    learning_curve,
    permutation_test_score,
    validation_curve,
)
from sklearn.multiclass import OneVsOneClassifier, OneVsRestClassifier
from sklearn.multioutput import MultiOutputClassifier, MultiOutputRegressor
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor
from sklearn.utils import parallel
from skyward_lite.client.completions import CompletionQueue
from threadpoolctl import threadpool_limits

X, Y = load_iris(return_X_y=True)
DIGITS, DIGIT = (part[:200] for part in load_digits(return_X_y=True))
LINE, TARGET = make_regression(60, 6, n_informative=3, noise=3.0, random_state=0)
TREE = DecisionTreeClassifier(random_state=0)

REMOTE: dict[str, Callable[[], Any]] = {}
"""Utilities with n_jobs=-1 that run on a pool, and give what they computed."""
HERE: dict[str, Callable[[], Any]] = {}
"""Utilities for which scikit-learn insists on threads that share memory: joblib keeps them in the client's process."""


def remote(make: Callable[[], Any]) -> Callable[[], Any]:
    REMOTE[make.__name__] = make
    return make


def here(make: Callable[[], Any]) -> Callable[[], Any]:
    HERE[make.__name__] = make
    return make


def scores(results):
    """Of a search or a validation, all but the times."""
    return {k: v for k, v in results.items() if "time" not in k and k not in ("params", "estimator")}


def trees(model):
    return [(t.tree_.threshold, t.tree_.feature, t.tree_.value) for t in np.ravel(model.estimators_)]


# ------------------------------------------------------------------------------------------------ model selection


@remote
def grid_search():
    found = GridSearchCV(SVC(), {"C": [0.1, 1, 10], "gamma": [1e-4, 1e-3]}, cv=3, n_jobs=-1).fit(DIGITS, DIGIT)
    return scores(found.cv_results_), found.best_params_, found.best_score_, found.best_estimator_.dual_coef_


@remote
def randomized_search():
    found = RandomizedSearchCV(SVC(), {"C": np.logspace(-2, 2, 50)}, n_iter=6, cv=3, random_state=0, n_jobs=-1)
    found.fit(X, Y)
    return scores(found.cv_results_), found.best_params_


@remote
def halving_grid_search():
    found = HalvingGridSearchCV(TREE, {"max_depth": [1, 2, 3, 4]}, cv=3, random_state=0, n_jobs=-1).fit(X, Y)
    return scores(found.cv_results_), found.best_params_


@remote
def cross_validation():
    model = make_pipeline(StandardScaler(), LogisticRegression())
    result = cross_validate(model, X, Y, cv=4, return_train_score=True, return_estimator=True, n_jobs=-1)
    return scores(result), [fitted[-1].coef_ for fitted in result["estimator"]]


@remote
def cross_validation_scores():
    return cross_val_score(SVC(), DIGITS, DIGIT, cv=4, n_jobs=-1)


@remote
def cross_validation_predictions():
    return cross_val_predict(LogisticRegression(max_iter=500), X, Y, cv=4, method="predict_proba", n_jobs=-1)


@remote
def learning_curves():
    return learning_curve(GaussianNB(), X, Y, cv=3, shuffle=True, random_state=0, n_jobs=-1)


@remote
def validation_curves():
    return validation_curve(SVC(), X, Y, param_name="gamma", param_range=[1e-3, 1e-2, 1e-1], cv=3, n_jobs=-1)


@remote
def permutation_tests():
    return permutation_test_score(TREE, X, Y, cv=3, n_permutations=6, random_state=0, n_jobs=-1)


@remote
def recursive_elimination():
    found = RFECV(LogisticRegression(max_iter=500), cv=3, n_jobs=-1).fit(X, Y)
    return found.ranking_, scores(found.cv_results_)


@remote
def sequential_selection():
    return SequentialFeatureSelector(TREE, n_features_to_select=2, cv=3, n_jobs=-1).fit(X, Y).support_


@remote
def permutation_importances():
    found = permutation_importance(GaussianNB().fit(X, Y), X, Y, n_repeats=4, random_state=0, n_jobs=-1)
    return found.importances, found.importances_mean


# ------------------------------------------------------------------------------------------------ ensembles


@remote
def bagging():
    model = BaggingClassifier(TREE, n_estimators=8, max_samples=0.5, random_state=0, n_jobs=-1).fit(X, Y)
    return trees(model), model.estimators_samples_, model.predict(X), model.predict_proba(X)


@remote
def voting():
    model = VotingClassifier([("a", GaussianNB()), ("b", TREE), ("c", SVC())], n_jobs=-1).fit(X, Y)
    return model.predict(X), model.transform(X)


@remote
def stacking():
    parts = [("svc", SVC()), ("tree", TREE), ("bayes", GaussianNB())]
    model = StackingClassifier(parts, LogisticRegression(max_iter=500), cv=3, n_jobs=-1).fit(X, Y)
    return model.final_estimator_.coef_, model.predict_proba(X)


@remote
def random_forest():
    model = RandomForestClassifier(12, random_state=0, n_jobs=-1).fit(X, Y)
    return trees(model), model.feature_importances_, model.set_params(n_jobs=1).predict_proba(X)


@remote
def extra_trees():
    model = ExtraTreesRegressor(12, random_state=0, n_jobs=-1).fit(LINE, TARGET)
    return trees(model), model.set_params(n_jobs=1).predict(LINE)


@remote
def isolation_forest():
    model = IsolationForest(n_estimators=12, random_state=0, n_jobs=-1).fit(X)
    return trees(model), model.set_params(n_jobs=1).score_samples(X)


# ------------------------------------------------------------------------------------------------ several outputs


@remote
def many_outputs():
    both = np.c_[Y, Y[::-1]]
    model = MultiOutputClassifier(LogisticRegression(max_iter=500), n_jobs=-1).fit(X, both)
    return [part.coef_ for part in model.estimators_], model.predict(X)


@remote
def many_targets():
    model = MultiOutputRegressor(DecisionTreeRegressor(random_state=0), n_jobs=-1).fit(LINE, np.c_[TARGET, -TARGET])
    return trees(model), model.predict(LINE)


@remote
def one_against_the_rest():
    model = OneVsRestClassifier(SVC(), n_jobs=-1).fit(X, Y)
    return model.predict(X), model.decision_function(X)


@remote
def one_against_one():
    model = OneVsOneClassifier(SVC(), n_jobs=-1).fit(X, Y)
    return model.predict(X), model.decision_function(X)


# ------------------------------------------------------------------------------------------------ transformers


@remote
def column_transformer():
    parts = [("scaled", StandardScaler(), [0, 1]), ("span", MinMaxScaler(), [2]), ("mean", SimpleImputer(), [3])]
    return ColumnTransformer(parts, n_jobs=-1).fit_transform(X)


@remote
def feature_union():
    return FeatureUnion([("scaled", StandardScaler()), ("span", MinMaxScaler())], n_jobs=-1).fit_transform(X)


@remote
def dictionary_learning():
    model = MiniBatchDictionaryLearning(4, batch_size=20, max_iter=3, random_state=0, n_jobs=-1).fit(DIGITS[:60])
    return model.components_, model.transform(DIGITS[:60])


# ------------------------------------------------------------------------------------------------ models


@remote
def lasso_path():
    model = LassoCV(cv=3, alphas=10, n_jobs=-1).fit(LINE, TARGET)
    return model.mse_path_, model.coef_, model.alpha_


@here
def stochastic_descent():
    return SGDClassifier(max_iter=20, tol=None, random_state=0, n_jobs=-1).fit(X, Y).coef_


@remote
def median_regression():
    return TheilSenRegressor(max_subpopulation=200, random_state=0, n_jobs=-1).fit(LINE, TARGET).coef_


@remote
def calibration():
    return CalibratedClassifierCV(SVC(), cv=3, n_jobs=-1).fit(X, Y).predict_proba(X)


@remote
def nearest_neighbours():
    return KNeighborsClassifier(algorithm="kd_tree", n_jobs=-1).fit(X, Y).kneighbors(X)


@remote
def mean_shift():
    return MeanShift(bandwidth=1.0, n_jobs=-1).fit(X).cluster_centers_


@here
def forest_predictions():
    model = RandomForestClassifier(12, random_state=0, n_jobs=1).fit(X, Y).set_params(n_jobs=-1)
    return model.predict(X), model.predict_proba(X)


@here
def distances():
    # Not "euclidean": BLAS sums in another order for each part, and the parts depend on n_jobs.
    return pairwise_distances(LINE, metric="manhattan", n_jobs=-1)


# ------------------------------------------------------------------------------------------------ the tests


@dataclasses.dataclass
class Spied:
    """A pool that is joblib's default, and the number of tasks that were sent to it."""

    pool: sky.ComputePool
    sent: int = 0


@pytest.fixture(scope="module", params=["thread", "process"])
def spied(request):
    """One pool of each executor for all tests here, its workers and this process with one BLAS and OpenMP thread."""
    image = sky.Image(env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
    worker = sky.Worker(concurrency=2, executor=request.param)
    with (
        threadpool_limits(1),
        pytest.MonkeyPatch.context() as patch,
        sky.pool(worker=worker, image=image, plugins=[sky.plugins.sklearn()]) as pool,
    ):
        spied, send = Spied(pool), CompletionQueue.send

        def count(*task):
            spied.sent += 1
            return send(*task)

        patch.setattr(CompletionQueue, "send", count)
        yield spied


@pytest.fixture
def shared_pool(spied):
    """The pool outlives its tests; nothing else is left behind."""
    spied.sent = 0


pytestmark = pytest.mark.usefixtures("shared_pool")


def serial(run):
    """Run the same in this process, one task after the other."""
    with parallel_config(backend="sequential"):
        return run()


@pytest.mark.parametrize("name", REMOTE)
def test_scikit_learn_equals_a_serial_run(spied, name):
    """Every number is a serial run's to the last bit, and tasks went to the workers."""
    expected = serial(REMOTE[name])
    assert spied.sent == 0
    np.testing.assert_equal(REMOTE[name](), expected)
    assert spied.sent > 1


@pytest.mark.parametrize("name", HERE)
def test_scikit_learn_with_shared_memory_stays_here(spied, name):
    """With require="sharedmem" or backend="threading" in scikit-learn the result is right and nothing is sent."""
    np.testing.assert_equal(HERE[name](), serial(HERE[name]))
    assert spied.sent == 0


def test_scikit_learn_with_results_that_depend_on_n_jobs(spied):
    """LatentDirichletAllocation, whose numbers depend on n_jobs with any backend, equals as many processes here."""

    def topics():
        counts = sparse.csr_matrix(DIGITS[:60])
        model = LatentDirichletAllocation(4, max_iter=2, learning_method="batch", random_state=0, n_jobs=-1)
        return model.fit_transform(counts), model.components_

    with parallel_config(backend="loky", n_jobs=2):
        expected = topics()
    assert spied.sent == 0
    np.testing.assert_equal(topics(), expected)
    assert spied.sent > 1


def test_scikit_learn_config_context_reaches_the_workers(spied):
    """scikit-learn's `config_context` holds for the tasks too."""
    with config_context(enable_metadata_routing=True, working_memory=77):
        got = parallel.Parallel(n_jobs=-1)(parallel.delayed(get_config)() for _ in range(4))
    assert {config["working_memory"] for config in got} == {77}
    assert spied.sent > 0


def test_scikit_learn_fit_errors_arrive(spied):
    """With error_score="raise" the exception is the fit's own, with the remote traceback."""
    with pytest.raises(ValueError, match="gamma") as caught:
        GridSearchCV(SVC(), {"gamma": [-1.0, -2.0]}, error_score="raise", n_jobs=-1).fit(X, Y)
    assert "_validate_params" in str(caught.value.__cause__)


# ------------------------------------------------------------------------------------------------ NLTK

LINES = [f"The {n} quick brown foxes' jumping over {n * n} lazier dogs is well-known." for n in range(300)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: WordPunctTokenizer().tokenize,
        lambda: TreebankWordTokenizer().tokenize,
        lambda: PorterStemmer().stem,
    ],
    ids=["WordPunctTokenizer", "TreebankWordTokenizer", "PorterStemmer"],
)
def test_nltk_equals_its_serial_run(spied, make):
    """NLTK's `parallelize_preprocess` keeps the order of its lines."""
    # Made anew: NLTK 3.10's tokenizers do not survive pickle once they were used.
    expected = list(parallelize_preprocess(make(), LINES, processes=1))
    assert spied.sent == 0
    assert parallelize_preprocess(make(), LINES, processes=2) == expected
    assert spied.sent > 1
