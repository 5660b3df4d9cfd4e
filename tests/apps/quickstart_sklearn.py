"""An app as in Flower's quickstart for scikit-learn: logistic regression on iris. It knows nothing of coding."""
# As users write it: nobody narrows what a record holds.
# mypy: disable-error-code="arg-type, union-attr"

import warnings

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

RUN_CONFIG = {"num-server-rounds": 3, "local-epochs": 1}
LABELS = [0, 1, 2]
FEATURES = 4


def create_model(local_epochs):
    """A model of zeros, which fit() goes on from."""
    model = LogisticRegression(max_iter=local_epochs, warm_start=True)
    model.classes_ = np.array(LABELS)
    set_model_params(model, [np.zeros((len(LABELS), FEATURES)), np.zeros(len(LABELS))])
    return model


def get_model_params(model):
    """The parameters as a list of NumPy arrays."""
    return [model.coef_, model.intercept_]


def set_model_params(model, params):
    """Put the parameters in."""
    model.coef_, model.intercept_ = (np.array(array) for array in params)


def load_data(partition_id, num_partitions):
    """The training and the test part of one partition."""
    x, y = load_iris(return_X_y=True)
    x, y = x[partition_id::num_partitions], y[partition_id::num_partitions]
    test = np.arange(len(y)) % 5 == 0
    return x[~test], y[~test], x[test], y[test]


app = ClientApp()


@app.train()
def train(msg: Message, context: Context):
    """Train the model on local data."""
    model = create_model(context.run_config["local-epochs"])
    set_model_params(model, msg.content["arrays"].to_numpy_ndarrays())
    partition_id = context.node_config["partition-id"]
    x_train, y_train, _, _ = load_data(partition_id, context.node_config["num-partitions"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a few iterations do not converge
        model.fit(x_train, y_train)
    metrics = {
        "num-examples": len(x_train),
        "train_logloss": log_loss(y_train, model.predict_proba(x_train), labels=LABELS),
        "train_accuracy": model.score(x_train, y_train),
    }
    content = RecordDict({"arrays": ArrayRecord(get_model_params(model)), "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    """Evaluate the model on local data."""
    model = create_model(context.run_config["local-epochs"])
    set_model_params(model, msg.content["arrays"].to_numpy_ndarrays())
    partition_id = context.node_config["partition-id"]
    _, _, x_test, y_test = load_data(partition_id, context.node_config["num-partitions"])
    metrics = {
        "num-examples": len(x_test),
        "test_logloss": log_loss(y_test, model.predict_proba(x_test), labels=LABELS),
        "accuracy": model.score(x_test, y_test),
    }
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)


def main(grid: Grid, context: Context) -> Result:
    """The ServerApp's main function."""
    strategy = FedAvg()
    return strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(get_model_params(create_model(context.run_config["local-epochs"]))),
        num_rounds=context.run_config["num-server-rounds"],
    )
