// Azure SQL: a server that knows Microsoft Entra identities only, and one database. Change tracking and the rights of the
// app's identity are made inside it by sql/sqlserver-access.sql and sql/sqlserver-identity.sql (see infra/hooks).

@description('Name of the server.')
param serverName string

@description('Name of the database.')
param databaseName string

@description('Most vCores.')
param vCores int

@description('Region.')
param location string

@description('Tags.')
param tags object

@description('Object id of the administrator.')
param administratorId string

@description('Name shown for the administrator.')
param administratorName string

@description('What the administrator is.')
param administratorType string

@description('Whether the server is on the private network only.')
param privateNetwork bool

@description('Resource id of the network, if private.')
param networkId string

@description('Resource id of the subnet for private endpoints, if private.')
param endpointSubnetId string

resource server 'Microsoft.Sql/servers@2023-08-01' = {
  name: serverName
  location: location
  tags: tags
  properties: {
    version: '12.0'
    minimalTlsVersion: '1.2'
    publicNetworkAccess: privateNetwork ? 'Disabled' : 'Enabled'
    administrators: {
      administratorType: 'ActiveDirectory'
      azureADOnlyAuthentication: true
      login: administratorName
      principalType: administratorType
      sid: administratorId
      tenantId: subscription().tenantId
    }
  }
}

resource database 'Microsoft.Sql/servers/databases@2023-08-01' = {
  parent: server
  name: databaseName
  location: location
  tags: tags
  sku: {
    name: 'GP_S_Gen5'
    tier: 'GeneralPurpose'
    family: 'Gen5'
    capacity: vCores
  }
  properties: {
    // The trigger polls every second: the database would never pause, and a paused one would answer 40613 first.
    autoPauseDelay: -1
  }
}

// Without a private network an app has no address of its own. This admits Azure's; what opens the door is the identity.
resource azure 'Microsoft.Sql/servers/firewallRules@2023-08-01' = if (!privateNetwork) {
  parent: server
  name: 'AllowAllWindowsAzureIps'
  properties: {
    startIpAddress: '0.0.0.0'
    endIpAddress: '0.0.0.0'
  }
}

module endpoint 'private-endpoint.bicep' = if (privateNetwork) {
  name: 'endpoint-sql'
  params: {
    name: 'pe-${serverName}'
    location: location
    tags: tags
    serviceId: server.id
    groupId: 'sqlServer'
    zoneName: 'privatelink${environment().suffixes.sqlServerHostname}'
    networkId: networkId
    subnetId: endpointSubnetId
  }
}

@description('Name of the server as a resource.')
output serverName string = server.name

@description('Host name of the server.')
output host string = server.properties.fullyQualifiedDomainName

@description('Name of the database.')
output name string = database.name
