// Azure Managed Redis with TLS and Microsoft Entra identities only. Behind the Enterprise clustering policy it is one
// endpoint and one server to its clients, whatever it is made of: no redirections, and scripts may use any keys.

@description('Name of the cluster.')
param name string

@description('Region.')
param location string

@description('Tags.')
param tags object

@description('Size.')
param sku string

@description('Object id of the app\'s identity, which is also its user name.')
param principalId string

@description('Whether it is on the private network only.')
param privateNetwork bool

@description('Resource id of the network, if private.')
param networkId string

@description('Resource id of the subnet for private endpoints, if private.')
param endpointSubnetId string

resource cluster 'Microsoft.Cache/redisEnterprise@2025-07-01' = {
  name: name
  location: location
  tags: tags
  sku: {
    name: sku
  }
  properties: {
    minimumTlsVersion: '1.2'
    publicNetworkAccess: privateNetwork ? 'Disabled' : 'Enabled'
  }
}

resource database 'Microsoft.Cache/redisEnterprise/databases@2025-07-01' = {
  parent: cluster
  name: 'default'
  properties: {
    clientProtocol: 'Encrypted'
    port: 10000
    clusteringPolicy: 'EnterpriseCluster'
    // Entries have a lifetime and may go; the invalidation log has none and must stay.
    evictionPolicy: 'VolatileLRU'
    accessKeysAuthentication: 'Disabled'
  }
}

resource access 'Microsoft.Cache/redisEnterprise/databases/accessPolicyAssignments@2025-07-01' = {
  parent: database
  name: 'app'
  properties: {
    accessPolicyName: 'default'
    user: {
      objectId: principalId
    }
  }
}

module endpoint 'private-endpoint.bicep' = if (privateNetwork) {
  name: 'endpoint-redis'
  params: {
    name: 'pe-${name}'
    location: location
    tags: tags
    serviceId: cluster.id
    groupId: 'redisEnterprise'
    zoneName: 'privatelink.redis.azure.net'
    networkId: networkId
    subnetId: endpointSubnetId
  }
  // A cluster that is being changed refuses other changes.
  dependsOn: [
    access
  ]
}

@description('Host name.')
output host string = cluster.properties.hostName

@description('Port.')
output port int = database.properties.port
