"""A prediction service with a detector in front of its model, and the client for it (`pip install 'samelib[serve]'`).

request -> app -> intake (bytes to images) -> guard (stamps, answers, decisions) -> batching -> victim, detector
attack -> client.RemoteGateway -> request
"""
