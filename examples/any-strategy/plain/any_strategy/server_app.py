"""ServerApp: the median of what the clients send, and the accuracy on test images after each round."""

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedMedian
from sklearn.metrics import log_loss

from .task import create_model, initial_params, load_images

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    rounds = context.run_config["num-server-rounds"]
    strategy = FedMedian(fraction_evaluate=0.0)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(initial_params()),
        num_rounds=rounds,
        evaluate_fn=evaluate,
    )
    for number, metrics in result.evaluate_metrics_serverapp.items():
        print(f"round {number}: accuracy {metrics['accuracy']:.2%}, loss {metrics['loss']:.6f}")


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Loss and accuracy of the model after a round."""
    model = create_model(arrays.to_numpy_ndarrays())
    _, (x, y) = load_images()
    return MetricRecord({"loss": log_loss(y, model.predict_proba(x)), "accuracy": model.score(x, y)})
