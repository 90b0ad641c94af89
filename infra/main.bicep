// Everything product-cache needs in a subscription: whoever needs a right has an identity, and nothing here is secret.
//
// One user-assigned identity is the app's. It exists before the app does, so that every right is given before the first
// start; it outlives the app, and the staging slot of the Premium plan has the same one, so it needs no second set.
targetScope = 'subscription'

@description('Name of the environment: part of the resource group\'s name, and what all other names are made from.')
@minLength(1)
@maxLength(40)
param environmentName string

@description('Region of everything. It must offer the plan chosen and Azure Managed Redis.')
param location string

@description('flex: Flex Consumption. premium: Elastic Premium, which has deployment slots.')
@allowed([
  'flex'
  'premium'
])
param plan string = 'flex'

@description('Object id of the Microsoft Entra user, group or application that administers the SQL server; azd takes whoever is signed in.')
@minLength(36)
param administratorId string

@description('What the administrator is.')
@allowed([
  'User'
  'Group'
  'Application'
  'ServicePrincipal'
])
param administratorType string = 'User'

@description('Name the SQL server shows for its administrator; empty: the object id.')
param administratorName string = ''

@description('Keep storage, database and Redis off the public network: virtual network integration and private endpoints.')
param privateNetwork bool = false

@description('Most instances the app is scaled out to; the handler is told, and refuses a start that could exceed redisMaxClients.')
@minValue(1)
@maxValue(1000)
param maximumInstanceCount int = 40

@description('Memory of one Flex Consumption instance in MB.')
@allowed([
  512
  2048
  4096
])
param instanceMemoryMB int = 2048

@description('Name of the database.')
param databaseName string = 'product-cache'

@description('Most vCores of the database, which is serverless: each allows 75 queries at a time.')
@allowed([
  1
  2
  4
  6
  8
  10
  12
  14
  16
  18
  20
  24
  32
  40
])
param databaseVCores int = 2

@description('Size of Azure Managed Redis.')
param redisSku string = 'Balanced_B0'

@description('Connections that this size allows; 0: unknown, nothing is refused.')
@minValue(0)
param redisMaxClients int = 0

@description('Resource id of an action group that alerts tell; empty: no alerts.')
param alertActionGroupId string = ''

@description('Premium only: URL of the package the app runs, a blob in the releases container. Empty until the first deployment.')
param packageUrl string = ''

var token = uniqueString(subscription().id, environmentName, location)
var tags = {
  'azd-env-name': environmentName
}

resource group 'Microsoft.Resources/resourceGroups@2024-03-01' = {
  name: 'rg-${environmentName}'
  location: location
  tags: tags
}

module identity 'modules/identity.bicep' = {
  name: 'identity'
  scope: group
  params: {
    name: 'id-product-cache-${token}'
    location: location
    tags: tags
  }
}

module monitoring 'modules/monitoring.bicep' = {
  name: 'monitoring'
  scope: group
  params: {
    token: token
    location: location
    tags: tags
    principalId: identity.outputs.principalId
  }
}

module alerts 'modules/alerts.bicep' = if (!empty(alertActionGroupId)) {
  name: 'alerts'
  scope: group
  params: {
    token: token
    location: location
    tags: tags
    insightsId: monitoring.outputs.id
    actionGroupId: alertActionGroupId
  }
}

module network 'modules/network.bicep' = if (privateNetwork) {
  name: 'network'
  scope: group
  params: {
    token: token
    location: location
    tags: tags
    delegation: plan == 'flex' ? 'Microsoft.App/environments' : 'Microsoft.Web/serverFarms'
  }
}

module storage 'modules/storage.bicep' = {
  name: 'storage'
  scope: group
  params: {
    name: 'st${token}'
    location: location
    tags: tags
    principalId: identity.outputs.principalId
    uploaderId: plan == 'premium' ? administratorId : ''
    uploaderType: administratorType == 'Application' ? 'ServicePrincipal' : administratorType
    privateNetwork: privateNetwork
    networkId: privateNetwork ? network!.outputs.id : ''
    endpointSubnetId: privateNetwork ? network!.outputs.endpointSubnetId : ''
  }
}

module database 'modules/database.bicep' = {
  name: 'database'
  scope: group
  params: {
    serverName: 'sql-product-cache-${token}'
    databaseName: databaseName
    vCores: databaseVCores
    location: location
    tags: tags
    administratorId: administratorId
    administratorName: empty(administratorName) ? administratorId : administratorName
    administratorType: administratorType == 'ServicePrincipal' ? 'Application' : administratorType
    privateNetwork: privateNetwork
    networkId: privateNetwork ? network!.outputs.id : ''
    endpointSubnetId: privateNetwork ? network!.outputs.endpointSubnetId : ''
  }
}

module redis 'modules/redis.bicep' = {
  name: 'redis'
  scope: group
  params: {
    name: 'redis-product-cache-${token}'
    location: location
    tags: tags
    sku: redisSku
    principalId: identity.outputs.principalId
    privateNetwork: privateNetwork
    networkId: privateNetwork ? network!.outputs.id : ''
    endpointSubnetId: privateNetwork ? network!.outputs.endpointSubnetId : ''
  }
}

// What the plan allows, so that the handler is told no more.
var mostInstances = plan == 'premium' ? min(maximumInstanceCount, 100) : maximumInstanceCount

// Connections of one instance to the database. All instances together must stay within its workers, which are 75 a vCore
// (https://learn.microsoft.com/azure/azure-sql/database/resource-limits-vcore-single-databases); a fifth is left to the
// trigger and to people. One is the least, and more than the handler's own default of 8 gain nothing.
var databaseWorkers = 75 * databaseVCores
var databaseConnections = max(1, min(8, databaseWorkers * 4 / 5 / mostInstances))

// What the handler and the host are told on either plan. The host's SQL trigger reads Sql as well: the string is one
// that Microsoft.Data.SqlClient and the handler both understand.
var settings = [
  {
    name: 'Sql'
    value: 'Server=tcp:${database.outputs.host},1433;Database=${database.outputs.name};Authentication=Active Directory Managed Identity;User Id=${identity.outputs.clientId};Encrypt=True'
  }
  {
    name: 'Redis'
    value: '${redis.outputs.host}:${redis.outputs.port},ssl=True,abortConnect=False'
  }
  {
    name: 'REDIS_ENTRA_ID'
    value: identity.outputs.clientId
  }
  {
    name: 'REDIS_MAX_CLIENTS'
    value: string(redisMaxClients)
  }
  {
    name: 'MAX_INSTANCES'
    value: string(mostInstances)
  }
  {
    name: 'DATABASE_MAX_CONNECTIONS'
    value: string(databaseConnections)
  }
  {
    name: 'AzureWebJobsStorage__accountName'
    value: storage.outputs.name
  }
  {
    name: 'AzureWebJobsStorage__credential'
    value: 'managedidentity'
  }
  {
    name: 'AzureWebJobsStorage__clientId'
    value: identity.outputs.clientId
  }
  {
    name: 'APPLICATIONINSIGHTS_CONNECTION_STRING'
    value: monitoring.outputs.ingestion
  }
  {
    name: 'APPLICATIONINSIGHTS_AUTHENTICATION_STRING'
    value: 'Authorization=AAD;ClientId=${identity.outputs.clientId}'
  }
]

var appName = 'product-cache-${token}'
var appTags = union(tags, {
  'azd-service-name': 'handler'
})

module flex 'modules/app-flex.bicep' = if (plan == 'flex') {
  name: 'app-flex'
  scope: group
  params: {
    name: appName
    location: location
    tags: appTags
    identityId: identity.outputs.id
    settings: settings
    packageContainer: storage.outputs.packageContainer
    maximumInstanceCount: mostInstances
    instanceMemoryMB: instanceMemoryMB
    subnetId: privateNetwork ? network!.outputs.appSubnetId : ''
  }
}

module premium 'modules/app-premium.bicep' = if (plan == 'premium') {
  name: 'app-premium'
  scope: group
  params: {
    name: appName
    location: location
    tags: appTags
    identityId: identity.outputs.id
    settings: settings
    packageUrl: packageUrl
    maximumInstanceCount: mostInstances
    subnetId: privateNetwork ? network!.outputs.appSubnetId : ''
  }
}

@description('Resource group of everything.')
output AZURE_RESOURCE_GROUP string = group.name

@description('Name of the function app.')
output FUNCTION_APP_NAME string = appName

@description('Base address of the function app.')
output FUNCTION_APP_URL string = plan == 'flex' ? flex!.outputs.url : premium!.outputs.url

@description('Host name of the SQL server, for the hook that gives the identity its rights in the database.')
output SQL_SERVER string = database.outputs.host

@description('Name of the SQL server as a resource, for the hook\'s firewall rule.')
output SQL_SERVER_NAME string = database.outputs.serverName

@description('Name of the database.')
output SQL_DATABASE string = database.outputs.name

@description('Whether the SQL server is on the private network only, where the hook cannot reach it.')
output SQL_PRIVATE bool = privateNetwork

@description('Name of the app\'s identity: its user\'s name in the database.')
output APP_IDENTITY_NAME string = identity.outputs.name

@description('Client id of the app\'s identity.')
output APP_IDENTITY_CLIENT_ID string = identity.outputs.clientId

@description('URL of the container that packages of the Premium plan are uploaded to.')
output PACKAGE_CONTAINER string = storage.outputs.packageContainer
