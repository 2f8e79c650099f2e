"""Drawing: attention maps, principal components, neighbours, contact sheets and videos."""
