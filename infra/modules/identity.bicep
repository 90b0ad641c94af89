// The app's identity: the one that storage, database, Redis and Application Insights know.

@description('Name of the identity.')
param name string

@description('Region.')
param location string

@description('Tags.')
param tags object

resource identity 'Microsoft.ManagedIdentity/userAssignedIdentities@2023-01-31' = {
  name: name
  location: location
  tags: tags
}

@description('Resource id, for the app.')
output id string = identity.id

@description('Name, for the user in the database.')
output name string = identity.name

@description('Client id, for whoever asks for a token.')
output clientId string = identity.properties.clientId

@description('Object id, for role and access policy assignments.')
output principalId string = identity.properties.principalId
