"""Put adapters into a stock model."""
