// Alerts on what docs/operations.md ("What should page somebody") finds in Application Insights by itself.

@description('Suffix that makes names unique.')
param token string

@description('Region.')
param location string

@description('Tags.')
param tags object

@description('Resource id of the Application Insights that is asked.')
param insightsId string

@description('Resource id of the action group that is told.')
param actionGroupId string

resource failing 'Microsoft.Insights/scheduledQueryRules@2023-12-01' = {
  name: 'alert-product-cache-failing-${token}'
  location: location
  tags: tags
  properties: {
    displayName: 'product-cache: answers of 500 and above'
    description: 'More than 1 % of five minutes. docs/operations.md: Nothing answers, The database is down.'
    severity: 1
    enabled: true
    scopes: [
      insightsId
    ]
    evaluationFrequency: 'PT5M'
    windowSize: 'PT5M'
    criteria: {
      allOf: [
        {
          query: 'requests | where name == "GetProductById" | summarize failed = sumif(itemCount, toint(resultCode) >= 500), asked = sum(itemCount) | where failed * 100 > asked'
          timeAggregation: 'Count'
          operator: 'GreaterThan'
          threshold: 0
          failingPeriods: {
            numberOfEvaluationPeriods: 1
            minFailingPeriodsToAlert: 1
          }
        }
      ]
    }
    autoMitigate: true
    actions: {
      actionGroups: [
        actionGroupId
      ]
    }
  }
}

resource notStarting 'Microsoft.Insights/scheduledQueryRules@2023-12-01' = {
  name: 'alert-product-cache-start-${token}'
  location: location
  tags: tags
  properties: {
    displayName: 'product-cache: the handler does not start, or not with its database'
    description: 'docs/operations.md: Nothing answers, What should page somebody.'
    severity: 1
    enabled: true
    scopes: [
      insightsId
    ]
    evaluationFrequency: 'PT5M'
    windowSize: 'PT5M'
    criteria: {
      allOf: [
        {
          query: 'union traces, exceptions | extend said = iff(isempty(message), outerMessage, message) | where said has "Exceeded http worker restart retry count" or (said has "ready" and said has "SQLite")'
          timeAggregation: 'Count'
          operator: 'GreaterThan'
          threshold: 0
          failingPeriods: {
            numberOfEvaluationPeriods: 1
            minFailingPeriodsToAlert: 1
          }
        }
      ]
    }
    autoMitigate: true
    actions: {
      actionGroups: [
        actionGroupId
      ]
    }
  }
}
